"""Shards and pieces from sizes: pure functions over integers and names."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Final

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.header import HeaderEntry, build_header
from rv_distributed.checkpoint.index import shard_name
from rv_distributed.checkpoint.sources import Operand, Source, narrowed
from rv_distributed.plan.model import Piece, PieceTask, Plan, Segment, ShardPlan, Span, TensorPlan, VectorOperand

#: Borders between pieces are multiples of this in the output file, so no two workers touch one page.
PIECE_ALIGNMENT: Final = 1 << 20
#: Pieces are at most so large that they are nothing to lose, and at least so large that a task costs nothing beside its
#: bytes; in between, there are enough of them that all workers have some, and end together.
_MOST_PIECE_BYTES: Final = 64 << 20
_LEAST_PIECE_BYTES: Final = 8 << 20
_ENOUGH_PIECES: Final = 128
#: Larger than any shard: each is then one piece.
WHOLE_SHARDS: Final = 1 << 60


def group_into_shards(sizes: Sequence[int], max_bytes: int) -> list[int]:
    """How many tensors go in each shard: in order, as many as ``max_bytes`` of data hold, at least one."""
    counts: list[int] = []
    room = -1
    for size in sizes:
        if not counts or size > room:
            counts.append(0)
            room = max_bytes
        counts[-1] += 1
        room -= size
    return counts or [0]


def lay_out(
    entries: Sequence[tuple[str, str, tuple[int, ...], int]], max_shard_bytes: int, *, apart: int = 0
) -> tuple[ShardPlan, ...]:
    """The shards for tensors given as (name, dtype, shape, bytes), in that order; the last ``apart`` of them get shards
    of their own.

    Raises HeaderError when a shard's header would pass what the format allows.
    """
    sizes = [entry[3] for entry in entries]
    border = len(sizes) - apart
    counts = group_into_shards(sizes[:border], max_shard_bytes)
    counts += group_into_shards(sizes[border:], max_shard_bytes) if apart else []
    shards, first = [], 0
    for number, count in enumerate(counts, 1):
        header_entries, end = {}, 0
        for name, dtype, shape, nbytes in entries[first : first + count]:
            header_entries[name] = HeaderEntry(dtype, shape, end, end + nbytes)
            end += nbytes
        header = build_header(header_entries, {"format": "pt"})
        shards.append(ShardPlan(shard_name(number, len(counts)), header, len(header) + end, first, count))
        first += count
    return tuple(shards)


def size_pieces(nbytes: int) -> int:
    """The bytes of a piece of an output of ``nbytes``: 1 MiB times a power of two."""
    size = _MOST_PIECE_BYTES
    while size > _LEAST_PIECE_BYTES and nbytes < _ENOUGH_PIECES * size:
        size //= 2
    return size


def cut_pieces(sizes: Sequence[int], piece_bytes: int | None = None) -> tuple[Piece, ...]:
    """Cut files of the given sizes; every byte lies in exactly one piece.

    ``piece_bytes`` is a multiple of `PIECE_ALIGNMENT`, and so is every border inside a file; by default `size_pieces`.
    """
    piece_bytes = piece_bytes or size_pieces(sum(sizes))
    pieces: list[Piece] = []
    for shard, size in enumerate(sizes):
        for start in range(0, size, piece_bytes):
            pieces.append(Piece(len(pieces), shard, start, min(start + piece_bytes, size)))
    return tuple(pieces)


def task_of(plan: Plan, piece: Piece) -> PieceTask:
    """The self-contained task of one piece."""
    shard = plan.shards[piece.shard]
    literal = shard.header[piece.start : piece.stop]
    return PieceTask(piece, shard.name, literal, tuple(_spans(plan, piece)))


def _spans(plan: Plan, piece: Piece) -> Iterator[Span]:
    shard = plan.shards[piece.shard]
    end = shard.first + shard.length
    index = bisect_right(plan.tensors, piece.start, shard.first, end, key=lambda tensor: tensor.stop)
    while index < end and plan.tensors[index].start < piece.stop:
        tensor = plan.tensors[index]
        start, last = max(piece.start - tensor.start, 0), min(piece.stop, tensor.stop) - tensor.start
        for segment in tensor.segments:
            stop, at = min(segment.stop, last), tensor.start + start
            if start < stop:
                target, vectors = _narrowed(tensor, segment, start, stop)
                how = tensor.rule, target, vectors, segment.weights, tensor.requantized
                yield Span(index, tensor.name, tensor.dtype, start, stop, at, *how)
                start = stop
        index += 1


def _narrowed(
    tensor: TensorPlan, segment: Segment, start: int, stop: int
) -> tuple[Source | None, tuple[VectorOperand, ...]]:
    """The operands of a segment, with no more in them than bytes ``start`` to ``stop`` of the tensor need."""
    if all(isinstance(source, Operand) for source in segment.sources):
        return segment.target, segment.vectors
    item = 1 if tensor.is_opaque_in(segment) else item_bytes(tensor.dtype)
    first, last = start // item, -(-stop // item)
    if tensor.requantized is not None:
        first, last = tensor.requantized.band(first)[0], tensor.requantized.band(last - 1)[1]

    def less(source: Source) -> Source:
        return narrowed(source, first, last - first)

    vectors = (VectorOperand(v.vector, less(v.plus), less(v.minus) if v.minus else None) for v in segment.vectors)
    return less(segment.target) if segment.target else None, tuple(vectors)
