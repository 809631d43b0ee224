"""The Ray runtime: worker actors, one a GPU or a CPU each. The only module that imports ray.

The driver holds a short queue of calls on every actor and waits for whichever ends first. Actors are all
asked for at the start and used as they come up. An actor that dies or hangs is replaced, and its pieces go to the
actors that live; attempts write the same bytes to the same place, so one too many does no harm. Tensor
bytes never pass through here, nor through Ray's object store: a call carries a `PieceTask` and brings back
a `PieceResult`.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from rv_distributed.errors import RunError, RvError, UsageError, WorkerError, redacted
from rv_distributed.plan import PieceTask
from rv_distributed.runtime.model import PieceResult, WorkerConfig, patience_s
from rv_distributed.runtime.select import usable_cpus

#: Attempts at one piece before the run fails.
MAX_ATTEMPTS: Final = 3
#: Longest wait for a first worker: a cluster that scales up from nothing needs minutes.
_START_S: Final = 900
#: Ray's smallest object store is 75 MiB, and nothing of ours needs more.
_OBJECT_STORE_BYTES: Final = 100_000_000
#: What an actor takes beside its buffers: the interpreter and torch.
_ACTOR_BYTES: Final = 400 << 20


class _Actor:
    """A `Worker` in a process of its own. `start` is apart from the constructor, whose errors Ray hides.

    Our errors come back as values: Ray would print each one that the driver no longer waits for.
    """

    def start(self, config: WorkerConfig) -> RvError | None:
        # As in the command line's main: torch is not to be searched for garbage while it is imported.
        gc.set_threshold(100_000)
        import torch

        from rv_distributed.runtime.worker import Worker

        torch.set_num_threads(1)
        try:
            self._worker = Worker(config)
        except RvError as error:
            return error
        return None

    def run(self, task: PieceTask) -> PieceResult | RvError:
        try:
            return self._worker.run(task)
        except RvError as error:
            return error


class _Call(NamedTuple):
    """What a running call is for; ``task`` is None for an actor's start."""

    actor: Any
    task: PieceTask | None
    attempt: int
    due: float
    """When the actor counts as hanging, by the monotonic clock."""


class RayRuntime:
    """Runs tasks on actors of a Ray cluster, which it starts on this machine when there is none."""

    def __init__(
        self, *, address: str | None, workers: int | None, pieces: int, buffer_bytes: int, device: str
    ) -> None:
        self._address = address or os.environ.get("RAY_ADDRESS") or ""
        self._workers = workers
        self._pieces = pieces
        self._buffer_bytes = buffer_bytes
        self._device = device
        self._started = False
        self._gpus = 0

    def __enter__(self) -> RayRuntime:
        """Connect. Raises UsageError when the cluster cannot be reached or lacks what is asked for."""
        if self._address.startswith(("http://", "https://")):
            raise UsageError(
                f"{redacted(self._address)} is the address of a job server; give the cluster's, as host:port or auto"
            )
        self._started = not ray.is_initialized()
        try:
            if self._started:
                self._connect()
            if self._device != "cpu":
                self._gpus = int(ray.cluster_resources().get("GPU", 0))
            if self._device == "cuda" and self._gpus == 0:
                raise UsageError("--device cuda: the Ray cluster has no GPUs; use --device cpu")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            with _own_sigterm():
                ray.shutdown()

    def run(self, tasks: Iterable[PieceTask], config: WorkerConfig) -> Generator[PieceResult, None, None]:
        """As `Runtime.run`."""
        cpus = int(ray.cluster_resources().get("CPU", 1))
        count = min(self._pieces, self._workers or self._gpus or max(1, cpus))
        options = {
            "num_gpus": 1 if self._gpus else 0,
            "num_cpus": 1,
            "memory": _ACTOR_BYTES + self._buffer_bytes,
            "max_restarts": 0,
            "max_concurrency": config.streams + 1,
            "scheduling_strategy": "SPREAD",
        }
        pool = _Pool(replace(config, device="cuda" if self._gpus else "cpu"), count, options)
        try:
            yield from pool.run(iter(tasks))
        finally:
            pool.kill()

    def _connect(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        here = {
            "num_cpus": max(usable_cpus(), self._workers or 0),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        try:
            with _own_sigterm():
                ray.init(address=self._address or "local", **common, **({} if self._address else here))
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = redacted(self._address) or "this machine"
            raise UsageError(f"no Ray cluster could be reached at {where}: {redacted(str(error))}") from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM, which ray.init and ray.shutdown replace."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


class _Pool:
    """The actors of one run, and the calls on them."""

    def __init__(self, config: WorkerConfig, count: int, options: dict[str, Any]) -> None:
        self._config = config
        self._options = options
        self._deaths_left = count + MAX_ATTEMPTS
        self._calls: dict[Any, _Call] = {}
        self._held: dict[Any, int] = {}
        """Calls on each actor that is up."""
        self._alive: list[Any] = []
        self._requeued: deque[tuple[PieceTask, int]] = deque()
        for _ in range(count):
            self._add_actor()

    def run(self, tasks: Iterator[PieceTask]) -> Iterator[PieceResult]:
        """Yield the results of all tasks, in the order in which they are finished."""
        while True:
            self._fill(tasks)
            if self._held and not any(self._held.values()):
                return
            due = min(call.due for call in self._calls.values())
            ended = _wait(list(self._calls), max(0.0, due - time.monotonic()))
            if not ended and not self._held:
                raise WorkerError(
                    f"no worker came up in {_START_S} s: no node of the cluster has {self._options['num_cpus']} CPU, "
                    f"{self._options['num_gpus']} GPU and {self._options['memory']} bytes of memory to spare"
                )
            if not ended:
                self._lose_overdue()
            for ref in ended:
                call = self._calls.pop(ref)
                try:
                    result = ray.get(ref)
                except RayTaskError as error:
                    raise RunError(f"a worker failed: {error.cause!r}") from error
                except RayError as error:
                    self._lose(call, _brief(error))
                    continue
                if isinstance(result, RvError):
                    raise result
                if call.task is None:
                    self._held[call.actor] = 0
                else:
                    if call.actor in self._held:
                        self._held[call.actor] -= 1
                    yield result

    def kill(self) -> None:
        """End all actors, whatever they are doing."""
        for actor in self._alive:
            ray.kill(actor)

    def _add_actor(self) -> None:
        actor = ray.remote(_Actor).options(**self._options).remote()
        self._alive.append(actor)
        self._calls[actor.start.remote(self._config)] = _Call(actor, None, 0, time.monotonic() + _START_S)

    def _fill(self, tasks: Iterator[PieceTask]) -> None:
        """Give every ready actor as many calls as it has streams, and one to wait for its turn."""
        for depth in range(self._config.streams + 1):
            for actor, held in self._held.items():
                if held > depth:
                    continue
                task, attempt = self._requeued.popleft() if self._requeued else (next(tasks, None), 1)
                if task is None:
                    return
                # Twice its patience: it may have to wait for one piece that the actor makes before it.
                due = time.monotonic() + 2 * patience_s(task, len(self._config.outputs))
                self._calls[actor.run.remote(task)] = _Call(actor, task, attempt, due)
                self._held[actor] += 1

    def _lose_overdue(self) -> None:
        """Give up the actors that hang, and everything that they were to do."""
        now = time.monotonic()
        hanging = {call.actor for call in self._calls.values() if call.due <= now and call.task is not None}
        for ref, call in list(self._calls.items()):
            if call.actor in hanging:
                del self._calls[ref]
                self._lose(call, "it did not finish in time, and hangs")
            elif call.due <= now:
                # There are others: an actor that never comes up is no reason to stop.
                self._calls[ref] = call._replace(due=now + _START_S)

    def _lose(self, call: _Call, cause: str) -> None:
        """Take an actor out of the pool, requeue its piece, and ask for another in its place."""
        if call.actor in self._alive:
            self._alive.remove(call.actor)
            self._held.pop(call.actor, None)
            ray.kill(call.actor)
            self._deaths_left -= 1
            if self._deaths_left <= 0:
                raise WorkerError(f"workers keep dying; the last one: {cause}")
            self._add_actor()
        if call.task is not None:
            if call.attempt >= MAX_ATTEMPTS:
                piece = call.task.piece
                where = f"{call.task.shard_name}, bytes {piece.start} to {piece.stop}"
                raise WorkerError(f"{where}: {MAX_ATTEMPTS} workers died making it; the last one: {cause}")
            self._requeued.append((call.task, call.attempt + 1))


def _wait(calls: list[Any], timeout_s: float) -> list[Any]:
    """The calls that have ended, once there is one; none after ``timeout_s``."""
    try:
        ended: list[Any] = ray.wait(calls, num_returns=1, timeout=timeout_s)[0]
    except SystemError as error:
        # What a signal handler raised, wrapped by the extension module that it interrupted.
        if isinstance(error.__cause__, RvError):
            raise error.__cause__ from None
        raise
    return ended


def _brief(error: RayError) -> str:
    """The first line of an error of Ray's, which explains itself at length."""
    return str(error).partition("\n")[0]
