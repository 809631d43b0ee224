"""Cutting a task into chunks that fit the buffers: a pure function, executed by the worker.

A chunk is a window of the output file. Each source range it needs is read once into an arena; ranges that
touch in a file are read together. Arena places keep the file offset's remainder modulo the alignment of
direct I/O, so that reading the aligned blocks around a range never hits its neighbours. Behind all reads there is room
for what is decoded from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.sources import ByteRange, Decoded, Operand, Source
from rv_distributed.measures import Leaf
from rv_distributed.plan import PieceTask, Requantized, Span
from rv_distributed.storage.ranges import ALIGNMENT, DIRECT_MIN_BYTES

_SMALL_ALIGNMENT: Final = 64


class Read(NamedTuple):
    """One read: ``nbytes`` from ``offset`` of ``path`` to ``at`` in the arena."""

    path: str
    offset: int
    nbytes: int
    at: int


class Decoding(NamedTuple):
    """Elements of a source that have to be decoded, from bytes that the chunk's reads bring."""

    at: int
    """Where the first of them goes in the arena; behind all reads."""
    source: Decoded
    first: int
    """Of the source's elements."""
    elements: int


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
    carried: int = 0
    """Bytes at its start that come out of the chunk before: the rest of a band of a requantized tensor, whose elements
    are not among these."""


class Chunk(NamedTuple):
    """A window of the output file, and what it takes to fill it."""

    start: int
    stop: int
    literal: bytes
    """Header bytes, at the window's start."""
    reads: tuple[Read, ...]
    """By path and offset, and so by place."""
    parts: tuple[Part, ...]
    arena_bytes: int
    """Room that the reads and the decodings need."""
    decodings: tuple[Decoding, ...] = ()
    """By place."""


class BandScales(NamedTuple):
    """The scales of a row of blocks."""

    band: int
    """Its number in the tensor."""
    raw: tuple[bytes, ...]
    """By output, as they are stored."""


class Computed(NamedTuple):
    """Blocks that are finished, one after another."""

    start: int
    """Its first byte in the rows of the output buffers."""
    stop: int
    leaves: tuple[tuple[Leaf, ...], ...]
    """Their measures, by output; none where nothing is measured."""
    scales: BandScales | None = None
    """Those of a band of a requantized tensor, which is then alone, when it begins in the piece."""


def cut_chunks(task: PieceTask, chunk_bytes: int) -> Iterator[Chunk]:
    """The chunks of a task, in file order; ``chunk_bytes`` is a multiple of `ALIGNMENT`."""
    piece = task.piece
    for start in range(piece.start, piece.stop, chunk_bytes):
        stop = min(start + chunk_bytes, piece.stop)
        wants = _Wants([], [])
        drafts = [
            _draft(index, span, max(span.at, start), min(span.at + span.stop - span.start, stop), wants)
            for index, span in enumerate(task.spans)
            if span.at < stop and span.at + span.stop - span.start > start
        ]
        reads, decodings, places, arena_bytes = _place_all(wants)
        parts = tuple(
            Part(
                draft.span,
                draft.low - start,
                draft.high - draft.low,
                draft.skip,
                draft.first,
                draft.elements,
                places[draft.target],
                tuple((places[plus], places[minus]) for plus, minus in draft.vectors),
                draft.carried,
            )
            for draft in drafts
        )
        literal = task.literal[start - piece.start : stop - piece.start]
        yield Chunk(start, stop, literal, tuple(reads), parts, arena_bytes, tuple(decodings))


#: The number of no operand.
_NONE: Final = -1


class _Wants(NamedTuple):
    """What a chunk needs, before it has places."""

    ranges: list[ByteRange]
    decodings: list[Decoding]

    def add(self, source: Source, first: int, elements: int) -> int:
        """A number for some elements of a source: what is read counts up from 0, what is decoded down from -2."""
        if isinstance(source, Operand):
            self.ranges.append(source.range_of(first, elements))
            return len(self.ranges) - 1
        self.ranges.extend(source.ranges(first, elements))
        self.decodings.append(Decoding(-1, source, first, elements))
        return _NONE - len(self.decodings)


class _Draft(NamedTuple):
    """A `Part` whose operands are still numbers of what is wanted."""

    span: int
    low: int
    high: int
    skip: int
    first: int
    elements: int
    target: int
    vectors: tuple[tuple[int, int], ...]
    carried: int


def _draft(index: int, span: Span, low: int, high: int, wants: _Wants) -> _Draft:
    """The part of ``span`` in file bytes ``low`` to ``high``; adds what it needs."""
    opaque = span.is_opaque
    item = 1 if opaque else item_bytes(span.dtype)
    first_byte = span.start + low - span.at
    first, last = first_byte // item, -(-(first_byte + high - low) // item)
    carried = 0
    if span.requantized is not None:
        first, last, carried = _whole_bands(span.requantized, first, last, is_begun=first != span.start)

    def need(source: Source | None) -> int:
        if source is None:
            return _NONE
        if opaque:
            source = source._replace(dtype="U8") if isinstance(source, Operand) else source
        return wants.add(source, first, last - first)

    if first == last:
        return _Draft(index, low, high, 0, first, 0, _NONE, ((_NONE, _NONE),) * len(span.vectors), carried)
    target = need(span.target)
    vectors = tuple((need(vector.plus), need(vector.minus)) for vector in span.vectors)
    skip = first_byte + carried - first * item
    return _Draft(index, low, high, skip, first, last - first, target, vectors, carried)


def _whole_bands(how: Requantized, first: int, last: int, *, is_begun: bool) -> tuple[int, int, int]:
    """The elements of the bands that some elements need, and how many of these have been made already: when the span
    ``is_begun``, the first band that they are in the middle of was made for the chunk before."""
    start, stop = how.band(first)
    carried = 0
    if is_begun and start < first:
        start, carried = stop, min(stop, last) - first
    return start, how.band(last - 1)[1] if start < last else start, carried


def _place_all(wants: _Wants) -> tuple[list[Read], list[Decoding], dict[int, int], int]:
    """The reads, the decodings behind them, the place of each number, and the arena's size."""
    reads, found, end = _place(wants.ranges)
    places = {_NONE: -1, **dict(enumerate(found))}
    decodings = []
    for number, decoding in enumerate(wants.decodings, 1):
        at = -(-end // _SMALL_ALIGNMENT) * _SMALL_ALIGNMENT
        end = at + decoding.elements * item_bytes(decoding.source.dtype)
        decodings.append(decoding._replace(at=at))
        places[_NONE - number] = at
    return reads, decodings, places, end


def _place(ranges: list[ByteRange]) -> tuple[list[Read], list[int], int]:
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
