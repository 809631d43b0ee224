"""Where the elements of a tensor come from: one range of a file, or several that have to be decoded.

A plan names sources; a worker asks each for the byte ranges behind some of its elements, reads them, and hands them to
`rv_distributed.runtime.decoding`, which gives the elements back in the source's ``dtype``. Elements are counted in
row-major order from the source's own first one, which is not always its tensor's: see `shifted`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from rv_distributed.checkpoint.dtypes import item_bytes


class ByteRange(NamedTuple):
    """``nbytes`` bytes of ``path`` from ``offset``."""

    path: str
    offset: int
    nbytes: int


class Operand(NamedTuple):
    """Elements of ``dtype`` that lie one after another in ``path`` from byte ``offset``."""

    path: str
    offset: int
    dtype: str

    def range_of(self, first: int, count: int) -> ByteRange:
        """The bytes of ``count`` elements."""
        item = item_bytes(self.dtype)
        return ByteRange(self.path, self.offset + first * item, count * item)

    def as_bytes(self) -> Operand:
        """The same with a byte as its element, for dtypes that are only copied."""
        return self._replace(dtype="U8")


class BlockScaled(NamedTuple):
    """FP8 elements, each to be multiplied by the scale of the block of its matrix that it lies in: ``RN32(q·s)``.

    A tensor of more than two dimensions is a stack of matrices, each with its own grid of blocks; those at the lower
    and the right edge may be smaller.
    """

    weight: Operand
    """F8_E4M3."""
    scales: Operand
    """One for each block: of shape [matrices, ⌈rows / block rows⌉, ⌈columns / block columns⌉]."""
    rows: int
    """Of one matrix."""
    columns: int
    block: tuple[int, int]
    """Rows and columns of a block."""
    first: int = 0

    @property
    def dtype(self) -> str:
        """Of what is decoded."""
        return "F32"

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of one matrix, down and across."""
        return -(-self.rows // self.block[0]), -(-self.columns // self.block[1])

    def scale_row(self, element: int) -> int:
        """The row of all matrices' scales that an element, counted from the tensor's first, has its scale in."""
        matrix, row = divmod(element // self.columns, self.rows)
        return matrix * self.grid[0] + row // self.block[0]

    def ranges(self, first: int, count: int) -> list[ByteRange]:
        """The bytes behind some elements: theirs, and the rows of scales that they need."""
        first += self.first
        top, bottom = self.scale_row(first), self.scale_row(first + count - 1)
        across = self.grid[1]
        return [self.weight.range_of(first, count), self.scales.range_of(top * across, (bottom + 1 - top) * across)]


class Box(NamedTuple):
    """A part of a tensor that lies in one range of a file: a box of its elements, in row-major order."""

    path: str
    offset: int
    """Of its first element."""
    starts: tuple[int, ...]
    """Index of its first element in the tensor, by dimension."""
    sizes: tuple[int, ...]

    def before(self, element: int, shape: Sequence[int]) -> int:
        """How many of the box's elements come before an element of the tensor, which may be the one past its last."""
        found, left = 0, math.prod(self.sizes)
        rest, behind = math.prod(shape), element
        for size, start, length in zip(shape, self.starts, self.sizes, strict=True):
            rest, left = rest // size, left // length
            index, behind = divmod(behind, rest)
            found += min(max(index - start, 0), length) * left
            if not start <= index < start + length:
                break
        return found


class Gathered(NamedTuple):
    """A tensor that lies in several boxes, which cover it and do not overlap. Nothing is computed."""

    dtype: str
    shape: tuple[int, ...]
    """Not empty, and without a 0."""
    boxes: tuple[Box, ...]
    first: int = 0

    def overlapping(self, first: int, count: int) -> list[tuple[Box, int, int]]:
        """The boxes that hold some of the elements, each with the first of its own that is among them and the one past
        the last."""
        start, stop = self.first + first, self.first + first + count
        row = math.prod(self.shape[1:])
        top, bottom = start // row, (stop - 1) // row
        near = (box for box in self.boxes if box.starts[0] <= bottom and box.starts[0] + box.sizes[0] > top)
        found = ((box, box.before(start, self.shape), box.before(stop, self.shape)) for box in near)
        return [(box, low, high) for box, low, high in found if low < high]

    def ranges(self, first: int, count: int) -> list[ByteRange]:
        """The bytes behind some elements: a range for each box that holds some."""
        return [
            Operand(box.path, box.offset, self.dtype).range_of(low, high - low)
            for box, low, high in self.overlapping(first, count)
        ]

    def as_bytes(self) -> Gathered:
        """The same with a byte as its element, for dtypes that are only copied."""
        item = item_bytes(self.dtype)
        boxes = (box._replace(starts=(*box.starts, 0), sizes=(*box.sizes, item)) for box in self.boxes)
        return Gathered("U8", (*self.shape, item), tuple(boxes), self.first * item)


class LowRank(NamedTuple):
    """A matrix with a low-rank adapter: ``RN32(base + RN32(scale·Σₖ left[i, k]·right[k, j]))``.

    The sum goes over k in order, in float32, with each product and each sum rounded.
    """

    base: Operand | BlockScaled | Gathered | None
    """None: the adapter alone."""
    left: Operand
    """[rows, rank]; transposed, [rank, rows]."""
    right: Operand
    """[rank, columns]; transposed, [columns, rank]."""
    rank: int
    rows: int
    columns: int
    scale: float
    """Rounded to float32 before it is used."""
    is_transposed: bool
    """Whether both factors are stored the other way round."""
    first: int = 0

    @property
    def dtype(self) -> str:
        """Of what is decoded."""
        return "F32"

    def rows_of(self, first: int, count: int) -> tuple[int, int]:
        """The first row that some elements touch, and the one past the last."""
        first += self.first
        return first // self.columns, (first + count - 1) // self.columns + 1

    def ranges(self, first: int, count: int) -> list[ByteRange]:
        """The bytes behind some elements, but for those of `factors`."""
        found = [] if self.base is None else ranges_of(self.base, self.first + first, count)
        if not self.is_transposed:
            top, bottom = self.rows_of(first, count)
            found.append(self.left.range_of(top * self.rank, (bottom - top) * self.rank))
        return found

    def factors(self) -> list[Operand]:
        """What all elements need, and what is small enough to keep: the right factor, and the left one where its rows
        are not contiguous."""
        return [self.left, self.right] if self.is_transposed else [self.right]

    @property
    def kept_bytes(self) -> int:
        """Bytes of memory that the factors take, in float32."""
        return item_bytes(self.dtype) * self.rank * (self.columns + (self.rows if self.is_transposed else 0))


Decoded = BlockScaled | LowRank | Gathered
Source = Operand | Decoded


def ranges_of(source: Source, first: int, count: int) -> list[ByteRange]:
    """The byte ranges behind ``count`` elements of a source, but for an adapter's `LowRank.factors`."""
    return [source.range_of(first, count)] if isinstance(source, Operand) else source.ranges(first, count)


def how_decoded(source: Source) -> str:
    """How its elements are decoded, in words; empty where they only have to be read."""
    if isinstance(source, BlockScaled):
        return f"fp8 {source.block[0]}×{source.block[1]}"
    if isinstance(source, Gathered):
        return f"{len(source.boxes)} parts"
    if isinstance(source, LowRank):
        on = f" on {how}" if source.base is not None and (how := how_decoded(source.base)) else ""
        return f"lora of rank {source.rank}{on}"
    return ""


def paths_of(source: Source) -> Iterator[str]:
    """The files that its elements are made from, some more than once."""
    if isinstance(source, Operand):
        yield source.path
    elif isinstance(source, BlockScaled):
        yield from (source.weight.path, source.scales.path)
    elif isinstance(source, Gathered):
        yield from (box.path for box in source.boxes)
    else:
        yield from (source.left.path, source.right.path)
        yield from () if source.base is None else paths_of(source.base)


def path_of(source: Source, element: int) -> str:
    """The file that an element lies in; of an adapted one, that of its base."""
    if isinstance(source, LowRank) and source.base is None:
        return source.left.path
    return ranges_of(source, element, 1)[0].path


def shifted(source: Source, elements: int) -> Source:
    """The source whose element 0 is element ``elements`` of this one, which may be below 0: there is none then."""
    if isinstance(source, Operand):
        return source._replace(offset=source.offset + elements * item_bytes(source.dtype))
    return source._replace(first=source.first + elements)


_Any = TypeVar("_Any", bound="Operand | BlockScaled | LowRank | Gathered")


def narrowed(source: _Any, first: int, count: int) -> _Any:
    """The same source without the boxes that hold none of some elements, which is all that a task needs of it."""
    if isinstance(source, Gathered):
        return source._replace(boxes=tuple(box for box, _, _ in source.overlapping(first, count)))
    if isinstance(source, LowRank) and source.base is not None:
        return source._replace(base=narrowed(source.base, source.first + first, count))
    return source


class ElementBytes(NamedTuple):
    """What an element of a source takes, in bytes; without scales and factors."""

    read: float
    held: float
    """In memory: as it is read, and decoded."""


def element_bytes(source: Source) -> ElementBytes:
    """See `ElementBytes`."""
    item = item_bytes(source.dtype)
    if isinstance(source, Operand):
        return ElementBytes(item, item)
    if isinstance(source, Gathered):
        return ElementBytes(item, 2 * item)
    if isinstance(source, BlockScaled):
        return ElementBytes(1, 1 + item)
    base = ElementBytes(0, 0) if source.base is None else element_bytes(source.base)
    return ElementBytes(base.read, base.held + item)
