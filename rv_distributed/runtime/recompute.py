"""Making pieces of a finished output again and comparing them with its bytes; nothing is written.

The chunks, the reads and the arithmetic are those of the worker. `verify_against_inputs` calls this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final, NamedTuple

import torch

from rv_distributed.errors import PieceError
from rv_distributed.measures import Measures
from rv_distributed.plan import PieceTask
from rv_distributed.runtime.buffers import Buffer
from rv_distributed.runtime.chunks import Chunk, cut_chunks
from rv_distributed.runtime.compute import PartComputer
from rv_distributed.runtime.model import WorkerConfig
from rv_distributed.storage.ranges import ALIGNMENT, RangeReader

_NOTHING_MEASURED: Final = [Measures()]


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

    # As in the local runtime: the streams are the parallelism.
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(config.streams)
    try:
        yield from pool.map(compare, tasks)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)


class _Stream:
    """The buffers of one thread."""

    def __init__(self, config: WorkerConfig) -> None:
        device = torch.device(config.device)
        self._folder, self._chunk_bytes = config.outputs[0], config.chunk_bytes
        self._arena, self._made = Buffer(config.chunk_bytes, device), Buffer(config.chunk_bytes, device)
        # An aligned read begins up to one block before the chunk and ends up to one behind it.
        self._stored = Buffer(config.chunk_bytes + 2 * ALIGNMENT, device)
        self._computer = PartComputer(config, device)

    def compare(self, task: PieceTask) -> list[Difference]:
        found: list[Difference] = []
        for chunk in cut_chunks(task, self._chunk_bytes):
            names = tuple(task.spans[part.span].name for part in chunk.parts)
            self._arena.grow(chunk.arena_bytes)
            for read in chunk.reads:
                _read(read.path, self._arena, read.at, read.offset, read.nbytes, names)
            nbytes = chunk.stop - chunk.start
            at = chunk.start % ALIGNMENT
            _read(f"{self._folder}/{task.shard_name}", self._stored, at, chunk.start, nbytes, names)
            self._made.view[: len(chunk.literal)] = chunk.literal
            for part in chunk.parts:
                self._computer.compute(task.spans[part.span], part, self._arena, [self._made], _NOTHING_MEASURED)
            found += self._differences(task, chunk, at)
        return found

    def _differences(self, task: PieceTask, chunk: Chunk, at: int) -> Iterator[Difference]:
        places: list[tuple[str | None, int, int]] = [(None, 0, len(chunk.literal))]
        places += [(task.spans[part.span].name, part.at, part.nbytes) for part in chunk.parts]
        for name, start, nbytes in places:
            if nbytes == 0:
                continue
            made = self._made.tensor(start, nbytes, torch.uint8)
            stored = self._stored.tensor(at + start, nbytes, torch.uint8)
            if not torch.equal(made, stored):
                wrong = torch.nonzero(made != stored)
                first, last = int(wrong[0]), int(wrong[-1])
                begin = chunk.start + start
                yield Difference(task.shard_name, name, begin + first, begin + last + 1)


def _read(path: str, buffer: Buffer, at: int, offset: int, nbytes: int, names: tuple[str, ...]) -> None:
    try:
        with closing(RangeReader(path)) as reader:
            reader.read(buffer.view, at, offset, nbytes)
    except OSError as error:
        cause = f"cannot be read: {error.strerror or error}"
        raise PieceError(cause, path, offset, offset + nbytes, names) from error
