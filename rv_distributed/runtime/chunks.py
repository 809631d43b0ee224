"""Cutting a task into chunks that fit the buffers: a pure function, executed by the worker.

A chunk is a window of the output file. Each source range it needs is read once into an arena; ranges that
touch in a file are read together. Arena places keep the file offset's remainder modulo the alignment of
direct I/O, so that reading the aligned blocks around a range never hits its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.plan import Operand, PieceTask, Span
from rv_distributed.storage.ranges import ALIGNMENT, DIRECT_MIN_BYTES

_SMALL_ALIGNMENT: Final = 64


class Read(NamedTuple):
    """One read: ``nbytes`` from ``offset`` of ``path`` to ``at`` in the arena."""

    path: str
    offset: int
    nbytes: int
    at: int


class Part(NamedTuple):
    """The part of a span that one chunk makes: whole elements, of which some bytes may lie outside."""

    span: int
    """Index into the task's spans."""
    at: int
    """Where its first byte goes, counted in the chunk's window."""
    nbytes: int
    skip: int
    """Bytes of its first element that lie before the window."""
    first: int
    """Index of its first element, in the whole tensor."""
    elements: int
    """Elements that it touches. Of an opaque span, a byte counts as one."""
    target: int
    """The target's place in the arena; -1 without a target."""
    vectors: tuple[tuple[int, int], ...]
    """Places of each vector's two operands; -1 where there is none."""


class Chunk(NamedTuple):
    """A window of the output file, and what it takes to fill it."""

    start: int
    stop: int
    literal: bytes
    """Header bytes, at the window's start."""
    reads: tuple[Read, ...]
    parts: tuple[Part, ...]
    arena_bytes: int
    """Room that the reads need."""


def cut_chunks(task: PieceTask, chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of a task, in file order; ``chunk_bytes`` is a multiple of `ALIGNMENT`."""
    piece = task.piece
    for start in range(piece.start, piece.stop, chunk_bytes):
        stop = min(start + chunk_bytes, piece.stop)
        ranges: list[_Range] = []
        drafts = [
            _draft(index, span, max(span.at, start), min(span.at + span.stop - span.start, stop), ranges)
            for index, span in enumerate(task.spans)
            if span.at < stop and span.at + span.stop - span.start > start
        ]
        reads, places, arena_bytes = _place(ranges)
        parts = tuple(
            Part(
                draft.span,
                draft.low - start,
                draft.high - draft.low,
                draft.skip,
                draft.first,
                draft.elements,
                places[draft.target] if draft.target >= 0 else -1,
                tuple((places[plus], places[minus] if minus >= 0 else -1) for plus, minus in draft.vectors),
            )
            for draft in drafts
        )
        literal = task.literal[start - piece.start : stop - piece.start]
        yield Chunk(start, stop, literal, tuple(reads), parts, arena_bytes)


class _Range(NamedTuple):
    path: str
    offset: int
    nbytes: int


class _Draft(NamedTuple):
    """A `Part` whose operands are still indexes into the list of ranges."""

    span: int
    low: int
    high: int
    skip: int
    first: int
    elements: int
    target: int
    vectors: tuple[tuple[int, int], ...]


def _draft(index: int, span: Span, low: int, high: int, ranges: list[_Range]) -> _Draft:
    """The part of ``span`` in file bytes ``low`` to ``high``; appends the source ranges it needs."""
    opaque = span.is_opaque
    item = 1 if opaque else item_bytes(span.dtype)
    first_byte = span.start + low - span.at
    first, last = first_byte // item, -(-(first_byte + high - low) // item)

    def need(operand: Operand | None) -> int:
        if operand is None:
            return -1
        width = 1 if opaque else item_bytes(operand.dtype)
        ranges.append(_Range(operand.path, operand.offset + first * width, (last - first) * width))
        return len(ranges) - 1

    target = need(span.target)
    vectors = tuple((need(vector.plus), need(vector.minus)) for vector in span.vectors)
    return _Draft(index, low, high, first_byte - first * item, first, last - first, target, vectors)


def _place(ranges: list[_Range]) -> tuple[list[Read], list[int], int]:
    """Merge ranges that touch into reads; the reads, each range's place, and the arena's size."""
    places = [0] * len(ranges)
    reads: list[Read] = []
    free = 0
    order = sorted(range(len(ranges)), key=ranges.__getitem__)
    position = 0
    while position < len(order):
        path, offset, nbytes = ranges[order[position]]
        end, after = offset + nbytes, position + 1
        while after < len(order) and ranges[order[after]].path == path and ranges[order[after]].offset <= end:
            end = max(end, ranges[order[after]].offset + ranges[order[after]].nbytes)
            after += 1
        direct = end - offset >= DIRECT_MIN_BYTES
        step = ALIGNMENT if direct else _SMALL_ALIGNMENT
        at = -(-free // step) * step + offset % step
        reads.append(Read(path, offset, end - offset, at))
        free = at + end - offset
        if direct:
            free = -(-free // ALIGNMENT) * ALIGNMENT
        for number in order[position:after]:
            places[number] = at + ranges[number].offset - offset
        position = after
    return reads, places, free
