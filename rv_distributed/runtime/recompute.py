"""Making pieces of a finished output again and comparing them with its bytes; nothing is written.

`verify_against_inputs` calls this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np

from rv_distributed.checkpoint.uris import join
from rv_distributed.errors import PieceError
from rv_distributed.plan import PieceTask, Requantized
from rv_distributed.runtime.buffers import Buffer, Bytes
from rv_distributed.runtime.chunks import BandScales
from rv_distributed.runtime.dry import DryChunk, DryStream, each_piece
from rv_distributed.runtime.model import WorkerConfig
from rv_distributed.storage import open_reader
from rv_distributed.storage.ranges import ALIGNMENT


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

    def compare(stream: DryStream, task: PieceTask) -> list[Difference]:
        path = join(config.outputs[0], task.shard_name)
        # An aligned read begins up to one block before the chunk and ends up to one behind it.
        stored = Buffer(config.chunk_bytes + 2 * ALIGNMENT)
        found: list[Difference] = []
        for dry in stream.chunks(task):
            found += _differences(task, dry, _read(path, stored, dry.chunk.start, dry.chunk.stop, dry.names))
            for part, of_part in zip(dry.chunk.parts, dry.scales, strict=True):
                for scales in of_part:
                    found += _scale_differences(config.outputs[0], task.spans[part.span].requantized, scales, stored)
        return found

    return each_piece(tasks, config, compare)


def _read(path: str, stored: Buffer, start: int, stop: int, names: tuple[str, ...]) -> Bytes:
    """The bytes of a range as the output has them."""
    at = start % ALIGNMENT
    try:
        with closing(open_reader(path)) as reader:
            reader.read(stored.view, at, start, stop - start)
    except OSError as error:
        cause = f"cannot be read: {error.strerror or error}"
        raise PieceError(cause, path, start, stop, names) from error
    return stored.array[at : at + stop - start]


def _differences(task: PieceTask, dry: DryChunk, stored: Bytes) -> Iterator[Difference]:
    places: list[tuple[str | None, int, int]] = [(None, 0, len(dry.chunk.literal))]
    places += [(name, part.at, part.nbytes) for name, part in zip(dry.names, dry.chunk.parts, strict=True)]
    for name, start, nbytes in places:
        made, own = dry.made[start : start + nbytes], stored[start : start + nbytes]
        yield from _difference(task.shard_name, name, dry.chunk.start + start, made, own)


def _scale_differences(
    folder: str, how: Requantized | None, scales: BandScales, stored: Buffer
) -> Iterator[Difference]:
    """Of the scales of a band of a requantized tensor, which lie in a shard of their own."""
    if how is not None:
        made = np.frombuffer(scales.raw[0], np.uint8)
        start = how.scales_at + scales.band * made.size
        own = _read(join(folder, how.scales_shard), stored, start, start + made.size, (how.scales_name,))
        yield from _difference(how.scales_shard, how.scales_name, start, made, own)


def _difference(shard: str, name: str | None, start: int, made: Bytes, stored: Bytes) -> Iterator[Difference]:
    wrong = np.flatnonzero(made != stored)
    if wrong.size:
        yield Difference(shard, name, start + int(wrong[0]), start + int(wrong[-1]) + 1)
