"""Connecting to Ray, and what is asked of it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final
from urllib.parse import urlsplit

import ray
from ray.exceptions import RayError

from rv_distributed.errors import UsageError, redacted
from rv_distributed.plan import PieceTask
from rv_distributed.runtime.model import PieceResult, WorkerConfig, WorkerShape
from rv_distributed.runtime.on_ray.pool import Pool
from rv_distributed.runtime.on_ray.starting import quick_start
from rv_distributed.runtime.select import MOST_CPUS_BESIDE_GPU, RunOptions, usable_cpus

#: Ray's smallest object store is 75 MiB, and nothing of ours needs more.
_OBJECT_STORE_BYTES: Final = 100_000_000
#: What an actor takes beside its buffers: the interpreter and our packages; beside a GPU, torch and CUDA, too.
ACTOR_BYTES: Final = 400 << 20
GPU_ACTOR_BYTES: Final = 1000 << 20
#: How long a cluster's port may take to answer, and then the cluster: Ray itself gives up a token after 20 seconds, and
#: would try for ever where nothing answers.
_PORT_TIMEOUT_S: Final = 5.0
_CLUSTER_TIMEOUT_S: Final = 60.0
_TOKENS: Final = (
    "A cluster that wants a token, as ray start makes it, wants its own: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or "
    "~/.ray/auth_token; for one without tokens set RAY_AUTH_MODE=disabled"
)


class RayRuntime:
    """Runs tasks on actors of a Ray cluster, which it starts on this machine when there is none."""

    def __init__(self, options: RunOptions, *, pieces: int) -> None:
        self._options = options
        self._address = options.address or os.environ.get("RAY_ADDRESS") or ""
        self._pieces = pieces
        self._started = False
        self.shape = WorkerShape(1, has_gpu=False)

    def __enter__(self) -> RayRuntime:
        """Connect. Raises UsageError when the cluster cannot be reached or lacks what is asked for."""
        if self._address.startswith(("http://", "https://")):
            raise UsageError(
                f"{redacted(self._address)} is the address of a job server: submit the command there with rv submit, "
                "or give the cluster's own address, as host:port or auto"
            )
        self._started = not ray.is_initialized()
        try:
            if self._started:
                self._connect()
            gpus = _resource("GPU") if self._options.device != "cpu" else 0
            # A cluster that scales up may have none yet; how many are wanted has to be said then.
            may_come = self._options.workers is not None and not (self._started and not self._address)
            if self._options.device == "cuda" and gpus == 0 and not may_come:
                raise UsageError(
                    "--device cuda: the Ray cluster has no GPUs; use --device cpu, or give --workers if it scales up"
                )
            has_gpu = gpus > 0 or self._options.device == "cuda"
            cpus = self._options.cpus_per_worker or (_cpus_beside_gpu() if has_gpu else 1)
            self.shape = WorkerShape(cpus, has_gpu)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._started:
            with _own_sigterm():
                ray.shutdown()

    def run(
        self, tasks: Iterable[PieceTask], config: WorkerConfig, *, kept: int = 0
    ) -> Generator[PieceResult, None, None]:
        """As `Runtime.run`."""
        device = self._options.device if self.shape.has_gpu else "cpu"
        config = replace(config, device=device)
        pool = Pool(config, self._wanted, self._requests(config), pieces=self._pieces, kept=kept)
        try:
            yield from pool.run(iter(tasks))
        finally:
            pool.kill()

    def _wanted(self) -> int:
        """How many actors are of use: as many as asked for, or as the cluster has room for just now."""
        room = _resource("GPU") if self.shape.has_gpu else _resource("CPU") // self.shape.cpus
        return self._options.workers or max(1, room)

    def placement(self) -> dict[str, Any]:
        """Ray's options for where a worker runs, and on how much; known once it is entered."""
        options: dict[str, Any] = {
            "num_gpus": 1 if self.shape.has_gpu else 0,
            # Beside a GPU it is not to wait for others, though it uses more than one.
            "num_cpus": 1 if self.shape.has_gpu else self.shape.cpus,
            "scheduling_strategy": "SPREAD",
        }
        if self._options.workers_per_node is not None:
            # Every node has one of this resource without declaring it; Ray Serve limits replicas by it, too.
            name = f"{ray._raylet.IMPLICIT_RESOURCE_PREFIX}rv_worker"
            options["resources"] = {name: 1 / self._options.workers_per_node}
        if self._options.node_labels:
            options["label_selector"] = dict(self._options.node_labels)
        return options

    def _requests(self, config: WorkerConfig) -> dict[str, Any]:
        """The options of every actor."""
        memory = (GPU_ACTOR_BYTES if self.shape.has_gpu else ACTOR_BYTES) + config.buffer_bytes
        return {**self.placement(), "memory": memory, "max_restarts": 0, "max_concurrency": config.streams + 1}

    def _connect(self) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        here = {
            "num_cpus": max(usable_cpus(), (self._options.workers or 0) * (self._options.cpus_per_worker or 1)),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        try:
            if not self._address:
                with _own_sigterm(), quick_start():
                    ray.init(address="local", **common, **here)
                return
            _ask_port(self._address)
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise self._unreached(error) from error
        try:
            _in_thread(lambda: ray.init(address=self._address, **common))
        except _NoAnswer as error:
            raise self._unreached(f"it did not answer within {_CLUSTER_TIMEOUT_S:.0f} s. {_TOKENS}") from error
        except RayError as error:
            raise self._unreached(error) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unreached(f"{error}. {_TOKENS}") from error

    def _unreached(self, why: object) -> UsageError:
        where = redacted(self._address) or "this machine"
        return UsageError(f"no Ray cluster could be reached at {where}: {redacted(str(why))}")


class _NoAnswer(Exception):
    """A cluster did not answer in time."""


def _ask_port(address: str) -> None:
    """Raise OSError when nothing listens at ``host:port`` or ``ray://host:port``; what ``auto`` finds Ray can say."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = place.port
    except ValueError as error:
        raise ValueError(f"{error}; write an IPv6 address in brackets, [fd00::1]:6379") from error
    if place.hostname is not None and port is not None:
        socket.create_connection((place.hostname, port), _PORT_TIMEOUT_S).close()


def _in_thread(connect: Callable[[], object]) -> None:
    """Call ``connect``, and wait for it where signals are heard: Python hears none while Ray's C++ tries to connect.

    Raises what it raises, and _NoAnswer when it takes too long: then what it connects to is left as soon as it has.
    """
    done: futures.Future[None] = futures.Future()
    given_up = threading.Event()

    def call() -> None:
        try:
            connect()
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)
        else:
            if given_up.is_set():
                ray.shutdown()

    threading.Thread(target=call, name="rv-connect", daemon=True).start()
    try:
        # Not with `Future.result`: its TimeoutError may as well be one of Ray's.
        if not futures.wait([done], _CLUSTER_TIMEOUT_S).done:
            raise _NoAnswer
    except BaseException:
        given_up.set()
        raise
    done.result()


def _resource(name: str) -> int:
    """How much of a resource the nodes have that are alive now."""
    return int(ray.cluster_resources().get(name, 0))


def _cpus_beside_gpu() -> int:
    """How many CPUs each GPU's worker computes on: what there is for it on the node that has the fewest of them."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [of.get("CPU", 0) // of["GPU"] for of in alive if of.get("GPU", 0) >= 1]
    return max(1, int(min([MOST_CPUS_BESIDE_GPU, *shares])))


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM, which ray.init and ray.shutdown replace."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
