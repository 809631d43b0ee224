"""Computing pieces without writing them: for what compares or measures. The chunks, the reads and the arithmetic are
those of the worker."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from rv_distributed.measures import Leaf
from rv_distributed.plan import PieceTask, Plan
from rv_distributed.recipe import Stats
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.buffers import Buffer, Bytes
from rv_distributed.runtime.chunks import BandScales, Chunk, cut_chunks
from rv_distributed.runtime.compute import PartComputer
from rv_distributed.runtime.model import MOST_REQUESTS, WorkerConfig
from rv_distributed.runtime.select import usable_cpus
from rv_distributed.runtime.sizing import DEFAULT_BUDGET_BYTES, size_buffers

_Result = TypeVar("_Result")


class DryChunk(NamedTuple):
    """A chunk that was computed."""

    chunk: Chunk
    made: Bytes
    """Its bytes, as the first output has them; valid until the next one."""
    leaves: list[list[Leaf]]
    """What was measured, for each of its parts."""
    scales: list[list[BandScales]]
    """Of the bands of requantized tensors, for each of its parts."""
    names: tuple[str, ...]
    """Of its parts' tensors."""


class DryStream:
    """The buffers of one thread."""

    def __init__(self, config: WorkerConfig, fetching: Executor, stop: threading.Event) -> None:
        """``fetching`` and ``stop`` are as in `Arena`."""
        self._chunk_bytes = config.chunk_bytes
        self._processor = threading.Semaphore(1)
        self._arena = Arena(config.chunk_bytes, pinned=False, processor=self._processor, fetching=fetching, stop=stop)
        self._made = Buffer(config.chunk_bytes)
        self._computer = PartComputer(config, config.device)

    def chunks(self, task: PieceTask) -> Iterator[DryChunk]:
        """Compute a piece. Raises PieceError when a source cannot be read."""
        for chunk in cut_chunks(task, self._chunk_bytes):
            names = tuple(task.spans[part.span].name for part in chunk.parts)
            self._made.view[: len(chunk.literal)] = chunk.literal
            self._arena.load(chunk, names)
            leaves: list[list[Leaf]] = []
            scales: list[list[BandScales]] = []
            with self._processor:
                for part in chunk.parts:
                    out = self._made.array[np.newaxis, :]
                    computed = list(self._computer.compute(task.spans[part.span], part, self._arena, out, chunk.start))
                    leaves.append([leaf for blocks in computed for of_output in blocks.leaves for leaf in of_output])
                    scales.append([blocks.scales for blocks in computed if blocks.scales is not None])
            yield DryChunk(chunk, self._made.array, leaves, scales, names)


def dry_config(plan: Plan, *, output: str, stats: Stats) -> WorkerConfig:
    """As many streams as this machine has use for; ``output`` is the folder of the plan's one output."""
    sizing = size_buffers(plan, streams=min(16, 2 * usable_cpus()), budget_bytes=DEFAULT_BUDGET_BYTES)
    return WorkerConfig(
        outputs=(output,),
        numbers=(0,),
        weighted=plan.weighted,
        device="cpu",
        streams=sizing.streams,
        cpus=usable_cpus(),
        chunk_bytes=sizing.chunk_bytes,
        arenas=1,
        buffer_bytes=sizing.buffer_bytes,
        stats=stats,
        arithmetic=plan.arithmetic,
    )


def each_piece(
    tasks: Iterable[PieceTask], config: WorkerConfig, look: Callable[[DryStream, PieceTask], _Result]
) -> Iterator[_Result]:
    """What ``look`` finds in every piece, in their order, from ``config.streams`` threads at once.

    Tasks are taken shortly before their turn: those of a large model take much memory.
    """
    streams = threading.local()
    stop = threading.Event()

    def run(task: PieceTask) -> _Result:
        if not hasattr(streams, "own"):
            streams.own = DryStream(config, fetching, stop)
        return look(streams.own, task)

    fetching = ThreadPoolExecutor(MOST_REQUESTS, "rv-fetch")
    pool = ThreadPoolExecutor(config.streams)
    begun: deque[Future[_Result]] = deque()
    try:
        for task in tasks:
            begun.append(pool.submit(run, task))
            if len(begun) == 2 * config.streams:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        fetching.shutdown()
