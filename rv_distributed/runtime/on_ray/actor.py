"""What runs in a worker's process."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import ray

from rv_distributed.errors import RvError
from rv_distributed.logs import JsonLines
from rv_distributed.plan import PieceTask
from rv_distributed.runtime.model import PieceResult, WorkerConfig
from rv_distributed.runtime.on_ray.metrics import WorkerMetrics

_LOG = logging.getLogger("rv_distributed.worker")


class Ready(NamedTuple):
    """A worker that is up."""

    name: str
    """``host:pid``."""
    node: str
    """Ray's id of its node."""


class Made(NamedTuple):
    """What came of a call for some pieces."""

    results: list[PieceResult]
    error: RvError | None
    """What the piece after those failed with; the rest of them was not begun."""


class Actor:
    """A `Worker` in a process of its own. `start` is apart from the constructor, whose errors Ray hides.

    Our errors come back as values: Ray would print each one that the driver no longer waits for.
    """

    def start(self, config: WorkerConfig) -> Ready | RvError:
        # As in the command line's main: torch is not to be searched for garbage while it is imported.
        gc.set_threshold(100_000)
        from rv_distributed.runtime.worker import Worker, choose_device

        context = ray.get_runtime_context()
        self._job, self._node = context.get_job_id(), context.get_node_id()
        self._log_as_json()
        try:
            device = choose_device(config.device)
            if device.startswith("cuda"):
                config = replace(config, device=f"cuda:{_own_gpu()}")
            elif config.device == "auto" and ray.get_gpu_ids():
                _LOG.warning("torch sees no GPU", extra={"fields": {"node": self._node}})
            self._worker = Worker(config)
        except RvError as error:
            return error
        self._metrics = WorkerMetrics(self._job)
        return Ready(self._worker.name, self._node)

    def run(self, pickled: bytes, attempt: int) -> Made:
        """Make some pieces. Their tasks come pickled: Ray's own pickler takes five times as long."""
        tasks: tuple[PieceTask, ...] = pickle.loads(pickled)  # noqa: S301 - from our driver, as Ray would unpickle it
        results: list[PieceResult] = []
        try:
            results.extend(self._make(task, attempt) for task in tasks)
        except RvError as error:
            return Made(results, error)
        return Made(results, None)

    def _make(self, task: PieceTask, attempt: int) -> PieceResult:
        began = time.monotonic()
        about = {"job": self._job, "node": self._node, "worker": self._worker.name}
        about |= {"shard": task.shard_name, "piece": task.piece.number, "attempt": attempt}
        try:
            result = self._worker.run(task)
        except RvError as error:
            _LOG.error("piece failed", extra={"fields": {**about, "error": str(error)}})
            raise
        seconds = round(time.monotonic() - began, 3)
        _LOG.info("piece done", extra={"fields": {**about, "bytes": result.bytes_written, "seconds": seconds}})
        self._metrics.add(result)
        return result

    def _log_as_json(self) -> None:
        """Into the worker's own log file, which Ray keeps on the node."""
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonLines())
        _LOG.addHandler(handler)
        _LOG.setLevel(logging.INFO)
        _LOG.propagate = False


def _own_gpu() -> int:
    """The index that this process has for the GPU that Ray gave it.

    Ray usually leaves only that one visible; where it is told not to touch CUDA_VISIBLE_DEVICES, all are.
    """
    given = [str(gpu) for gpu in ray.get_gpu_ids()]
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not given:
        return 0
    if visible:
        return visible.index(given[0]) if given[0] in visible else 0
    return int(given[0]) if given[0].isdigit() else 0
