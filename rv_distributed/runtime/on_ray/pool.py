"""The actors of one run, and the calls on them.

The driver holds a short queue of calls on every actor and waits for whichever ends first. Actors are all asked for at
the start and used as they come up; more of them when the cluster grows. One that dies or hangs is replaced, and its
pieces go to the actors that live; attempts write the same bytes to the same place, so one too many does no harm. A
node that is being drained gets no new pieces.
"""

from __future__ import annotations

import logging
import pickle
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from rv_distributed.errors import RunError, RvError, WorkerError
from rv_distributed.plan import PieceTask
from rv_distributed.runtime.model import PieceResult, WorkerConfig, patience_s
from rv_distributed.runtime.on_ray.actor import Actor, Ready
from rv_distributed.runtime.on_ray.metrics import DriverMetrics
from rv_distributed.units import show_bytes

_LOG = logging.getLogger(__name__)
#: Attempts at one piece before the run fails.
MAX_ATTEMPTS: Final = 3
#: Longest wait while no worker is up: a cluster that scales up from nothing needs minutes.
START_S: Final = 900.0
#: How often the cluster is asked what became of it.
_LOOK_S: Final = 5.0
#: Longest call of ray.wait: what a signal handler raises comes out only at its end.
_WAIT_S: Final = 1.0
#: How long those that work are left to themselves once others only die.
_REST_S: Final = 900.0
#: Pieces smaller than this together go in one call, which takes far longer than they do; but not too many, since they
#: have the patience of one.
_CALL_BYTES: Final = 1 << 20
_CALL_PIECES: Final = 16
_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")


class _Call(NamedTuple):
    """What a running call is for; an actor's start has no tasks."""

    worker: _Worker
    tasks: tuple[PieceTask, ...]
    attempt: int
    due: float
    """When the actor counts as hanging, by the monotonic clock."""


@dataclass(slots=True, eq=False)
class _Worker:
    """An actor."""

    actor: Any
    ready: Ready | None = None
    """None until it is up."""
    calls: int = 0
    """Calls that it works at, or will next."""
    done: int = 0
    draining: bool = False

    @property
    def name(self) -> str:
        return self.ready.name if self.ready is not None else "a worker that was not up yet"


class Pool:
    """Runs tasks on as many actors as ``wanted`` says, each asked of Ray with ``options``. Of the ``pieces`` of the
    run, ``kept`` are finished already and not among the tasks."""

    def __init__(
        self, config: WorkerConfig, wanted: Callable[[], int], options: dict[str, Any], *, pieces: int, kept: int
    ) -> None:
        self._config = config
        self._wanted = wanted
        self._options = options
        self._pieces = pieces
        self._metrics = DriverMetrics(ray.get_runtime_context().get_job_id())
        self._calls: dict[Any, _Call] = {}
        self._workers: set[_Worker] = set()
        """All that were asked for and not lost."""
        self._up: list[_Worker] = []
        self._waiting: deque[tuple[tuple[PieceTask, ...], int]] = deque()
        """What goes to the next worker, each with the number of the attempt: what was lost, or else the next tasks."""
        self._done = kept
        self._most_deaths = 0
        """Of workers, one after the other: as many as there were at most may die together, with their nodes."""
        self._deaths = 0
        """Since a piece was finished."""
        self._stillborn = 0
        """Workers that were lost before they finished a piece, since one finished its first."""
        self._rests_until = 0.0
        """By the monotonic clock."""
        self._looked = time.monotonic()

    def run(self, tasks: Iterator[PieceTask]) -> Iterator[PieceResult]:
        """Yield the results of all tasks, in the order in which they are finished.

        Raises WorkerError when no workers are left to make them, and what a worker fails with.
        """
        self._grow()
        groups = _grouped(tasks)
        while True:
            everything_is_out = self._fill(groups)
            if everything_is_out and not any(call.tasks for call in self._calls.values()):
                self._metrics.progress(self._done, self._pieces)
                return
            if not self._calls:
                raise WorkerError("no worker is left, and those that were asked for died at once")
            ended = wait(list(self._calls), max(0.0, min(_WAIT_S, self._looked + _LOOK_S - time.monotonic())))
            if time.monotonic() >= self._looked + _LOOK_S:
                self._look()
            for ref in ended:
                if ref not in self._calls:
                    continue  # given up in between
                call = self._calls.pop(ref)
                call.worker.calls -= len(call.tasks) > 0
                try:
                    found = ray.get(ref)
                except RayTaskError as error:
                    raise RunError(f"a worker failed: {error.cause!r}") from error
                except RayError as error:
                    self._lose(call, brief(error))
                    continue
                if isinstance(found, RvError):
                    raise found
                if not call.tasks:
                    self._welcome(call.worker, found)
                    continue
                if not call.worker.done:
                    self._stillborn = 0
                self._deaths = 0
                self._done += len(found.results)
                call.worker.done += len(found.results)
                for result in found.results:
                    yield result._replace(attempt=call.attempt)
                if found.error is not None:
                    raise found.error

    def kill(self) -> None:
        """End all actors, whatever they are doing."""
        for worker in self._workers:
            ray.kill(worker.actor)

    def _grow(self) -> None:
        """Ask for the actors that the run can use and does not have. Where all that come die before they finish a
        piece while others work, a broken node is not to be asked again and again."""
        wanted = min(self._pieces - self._done, self._wanted())
        self._most_deaths = max(self._most_deaths, wanted + MAX_ATTEMPTS)
        serving = sum(not worker.draining for worker in self._workers)
        if serving and self._stillborn >= self._most_deaths and time.monotonic() < self._rests_until:
            return
        for _ in range(wanted - serving):
            self._add_actor()

    def _add_actor(self) -> None:
        worker = _Worker(ray.remote(Actor).options(**self._options).remote())
        self._workers.add(worker)
        self._calls[worker.actor.start.remote(self._config)] = _Call(worker, (), 0, time.monotonic() + START_S)

    def _welcome(self, worker: _Worker, ready: Ready) -> None:
        worker.ready = ready
        self._up.append(worker)
        _LOG.info("worker %s is up", worker.name, extra={"fields": {"worker": worker.name, "node": ready.node}})

    def _fill(self, groups: Iterator[tuple[PieceTask, ...]]) -> bool:
        """Give every ready actor as many calls as it has streams, and one to wait for its turn; whether no task is
        left to be given to anyone, which is to be known also where nobody can take one."""
        for depth in range(self._config.streams + 1):
            for worker in self._up:
                if worker.calls > depth or worker.draining:
                    continue
                if not self._has_tasks(groups):
                    return True
                tasks, attempt = self._waiting.popleft()
                # Twice their patience: they may have to wait for another call, which the actor works at before.
                due = time.monotonic() + 2 * max(patience_s(task, len(self._config.outputs)) for task in tasks)
                self._calls[worker.actor.run.remote(pickle.dumps(tasks), attempt)] = _Call(worker, tasks, attempt, due)
                worker.calls += 1
        return not self._has_tasks(groups)

    def _has_tasks(self, groups: Iterator[tuple[PieceTask, ...]]) -> bool:
        """Whether any wait for a worker; the next ones are taken out of ``groups`` to know."""
        if not self._waiting:
            self._waiting.extend((tasks, 1) for tasks in islice(groups, 1))
        return bool(self._waiting)

    def _look(self) -> None:
        """See to what nobody tells: actors that hang, nodes that are drained, a cluster that has grown."""
        now = self._looked = time.monotonic()
        if not self._up and all(call.due <= now for call in self._calls.values()):
            raise without_place(self._options, START_S)
        hanging = {call.worker for call in self._calls.values() if call.due <= now and call.tasks}
        for ref, call in list(self._calls.items()):
            if call.worker in hanging:
                del self._calls[ref]
                self._lose(call, "it did not finish in time, and hangs")
            elif call.due <= now:
                # There are others: an actor that never comes up is no reason to stop.
                self._calls[ref] = call._replace(due=now + START_S)
        self._drain(_draining_nodes())
        self._grow()
        self._metrics.progress(self._done, self._pieces)

    def _drain(self, nodes: set[str]) -> None:
        """Give no new pieces to workers on these nodes, and end those that have none left."""
        for worker in list(self._up):
            if worker.ready is not None and worker.ready.node in nodes and not worker.draining:
                worker.draining = True
                _LOG.warning("the node of worker %s is being drained; it gets no new pieces", worker.name)
            if worker.draining and worker.calls == 0:
                self._remove(worker)

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        with suppress(ValueError):
            self._up.remove(worker)
        ray.kill(worker.actor)

    def _lose(self, call: _Call, cause: str) -> None:
        """Take an actor out of the pool, requeue its pieces, and ask for another in its place."""
        worker, tasks = call.worker, call.tasks
        if worker in self._workers:
            self._remove(worker)
            _LOG.warning(
                "lost worker %s (%s); its pieces go to others",
                worker.name,
                cause,
                extra={"fields": {"worker": worker.name, "cause": cause}},
            )
            self._replace_or_give_up(worker, cause)
        if tasks:
            if call.attempt >= MAX_ATTEMPTS:
                first, *others = tasks
                where = f"{first.shard_name}, bytes {first.piece.start} to {first.piece.stop}"
                what = f"it and the {len(others)} pieces after it" if others else "it"
                raise WorkerError(f"{where}: {MAX_ATTEMPTS} workers died making {what}; the last one: {cause}")
            self._metrics.retry(len(tasks))
            self._waiting.append((tasks, call.attempt + 1))

    def _replace_or_give_up(self, lost: _Worker, cause: str) -> None:
        """Workers that die one after the other, with no piece finished in between, are not replaced for ever."""
        self._deaths += 1
        if not lost.done:
            self._stillborn += 1
            self._rests_until = time.monotonic() + _REST_S
        if self._deaths >= self._most_deaths:
            raise WorkerError(f"workers keep dying; the last one: {cause}")
        self._grow()


def _grouped(tasks: Iterator[PieceTask]) -> Iterator[tuple[PieceTask, ...]]:
    """The tasks, in order, as they go in one call each: one by one, or several that are small together."""
    group: list[PieceTask] = []
    nbytes = 0
    for task in tasks:
        nbytes += task.piece.stop - task.piece.start
        if group and (nbytes > _CALL_BYTES or len(group) == _CALL_PIECES):
            yield tuple(group)
            group, nbytes = [], task.piece.stop - task.piece.start
        group.append(task)
    if group:
        yield tuple(group)


def _draining_nodes() -> set[str]:
    # Ray has no public way to ask; without an answer, workers there go on until they are lost.
    with suppress(Exception):
        return set(ray._private.state.state.get_draining_nodes())
    return set()


def wait(calls: list[Any], timeout_s: float) -> list[Any]:
    """The calls that have ended, once there is one; none after ``timeout_s``."""
    try:
        ended: list[Any] = ray.wait(calls, num_returns=1, timeout=timeout_s)[0]
    except SystemError as error:
        # What a signal handler raised, wrapped by the extension module that it interrupted.
        if isinstance(error.__cause__, RvError):
            raise error.__cause__ from None
        raise
    return ended


def without_place(options: Mapping[str, Any], waited_s: float) -> WorkerError:
    """What to raise when nothing that asks Ray for these options was given a place for ``waited_s`` seconds."""
    asked = [f"{options['num_cpus']} CPU", f"{options['num_gpus']} GPU"]
    asked += [f"{show_bytes(options['memory'])} of memory"] if "memory" in options else []
    labels = ", ".join(f"{key}={value}" for key, value in options.get("label_selector", {}).items())
    return WorkerError(
        f"no worker came up in {waited_s:.0f} s: no node of the cluster{' with ' if labels else ''}{labels} has "
        f"{', '.join(asked[:-1])} and {asked[-1]} to spare. Wait until one has, or ask for less: see "
        "--cpus-per-worker, --device, --node-label and --memory-budget"
    )


def brief(error: RayError) -> str:
    """The line that matters of an error of Ray's, which explains itself at length."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()] or [repr(error)]
    line = lines[-1] if "creation task" in lines[0] else lines[0]
    if "No module named" in line:
        return f"{line}. Install rv-distributed, in the same version as here, on every node"
    return line
