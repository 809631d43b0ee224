"""Making pieces of a finished output again and comparing them with its bytes; nothing is written.

The chunks, the reads and the arithmetic are those of the worker. `verify_against_inputs` calls this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import numpy as np

from rv_distributed.errors import PieceError
from rv_distributed.plan import PieceTask, Requantized
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.buffers import Buffer
from rv_distributed.runtime.chunks import BandScales, Chunk, cut_chunks
from rv_distributed.runtime.compute import PartComputer
from rv_distributed.runtime.model import WorkerConfig
from rv_distributed.storage.ranges import ALIGNMENT, RangeReader


class Difference(NamedTuple):
    """A range of a shard that is not what its inputs give."""

    shard: str
    tensor: str | None
    """None in the header."""
    start: int
    """First byte that differs, in the file; all that differ within a chunk lie before ``stop``."""
    stop: int


def recompute(tasks: Iterable[PieceTask], config: WorkerConfig) -> Iterator[list[Difference]]:
    """Compare every task's piece with the file of its shard in ``config.outputs[0]``; yields in order.

    Raises PieceError when a source or the output cannot be read.
    """
    streams = threading.local()

    def compare(task: PieceTask) -> list[Difference]:
        if not hasattr(streams, "own"):
            streams.own = _Stream(config)
        own: _Stream = streams.own
        return own.compare(task)

    pool = ThreadPoolExecutor(config.streams)
    try:
        yield from pool.map(compare, tasks)
    finally:
        pool.shutdown(cancel_futures=True)


class _Stream:
    """The buffers of one thread."""

    def __init__(self, config: WorkerConfig) -> None:
        self._folder, self._chunk_bytes = config.outputs[0], config.chunk_bytes
        self._processor = threading.Semaphore(1)
        self._arena = Arena(config.chunk_bytes, pinned=False, processor=self._processor)
        self._made = Buffer(config.chunk_bytes)
        # An aligned read begins up to one block before the chunk and ends up to one behind it.
        self._stored = Buffer(config.chunk_bytes + 2 * ALIGNMENT)
        self._computer = PartComputer(config, config.device)

    def compare(self, task: PieceTask) -> list[Difference]:
        found: list[Difference] = []
        for chunk in cut_chunks(task, self._chunk_bytes):
            names = tuple(task.spans[part.span].name for part in chunk.parts)
            at = chunk.start % ALIGNMENT
            self._read_stored(task.shard_name, at, chunk.start, chunk.stop - chunk.start, names)
            self._made.view[: len(chunk.literal)] = chunk.literal
            self._arena.load(chunk, names)
            scales: list[tuple[Requantized, BandScales]] = []
            with self._processor:
                for part in chunk.parts:
                    span, out = task.spans[part.span], self._made.array[np.newaxis, :]
                    computed = self._computer.compute(span, part, self._arena, out, chunk.start)
                    of_part = [made.scales for made in computed if made.scales is not None]
                    scales += [(span.requantized, found) for found in of_part if span.requantized is not None]
            found += self._differences(task, chunk, at)
            found += (difference for of in scales for difference in self._scale_differences(*of))
        return found

    def _scale_differences(self, how: Requantized, scales: BandScales) -> Iterator[Difference]:
        made = np.frombuffer(scales.raw[0], np.uint8)
        offset = how.scales_at + scales.band * made.size
        self._read_stored(how.scales_shard, 0, offset, made.size, ())
        wrong = np.flatnonzero(made != self._stored.array[: made.size])
        if wrong.size:
            start, stop = offset + int(wrong[0]), offset + int(wrong[-1]) + 1
            yield Difference(how.scales_shard, how.scales_name, start, stop)

    def _read_stored(self, shard: str, at: int, offset: int, nbytes: int, names: tuple[str, ...]) -> None:
        path = f"{self._folder}/{shard}"
        try:
            with closing(RangeReader(path)) as reader:
                reader.read(self._stored.view, at, offset, nbytes)
        except OSError as error:
            cause = f"cannot be read: {error.strerror or error}"
            raise PieceError(cause, path, offset, offset + nbytes, names) from error

    def _differences(self, task: PieceTask, chunk: Chunk, at: int) -> Iterator[Difference]:
        places: list[tuple[str | None, int, int]] = [(None, 0, len(chunk.literal))]
        places += [(task.spans[part.span].name, part.at, part.nbytes) for part in chunk.parts]
        for name, start, nbytes in places:
            if nbytes == 0:
                continue
            made = self._made.array[start : start + nbytes]
            stored = self._stored.array[at + start : at + start + nbytes]
            if not np.array_equal(made, stored):
                wrong = np.flatnonzero(made != stored)
                first, last = int(wrong[0]), int(wrong[-1])
                begin = chunk.start + start
                yield Difference(task.shard_name, name, begin + first, begin + last + 1)
