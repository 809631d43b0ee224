"""Decoding the elements of a source that do not lie in one range of a file: on the processor, whatever the device.

An arena calls `Decoder.decode` for each block of such a source; `read_source` and `element_of` are for those that
look at a few elements and have no arena.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import closing

import numpy as np
import numpy.typing as npt

from rv_distributed.checkpoint.dtypes import WIDE, item_bytes
from rv_distributed.checkpoint.sources import (
    BlockScaled,
    Box,
    ByteRange,
    Decoded,
    Gathered,
    LowRank,
    Operand,
    Source,
)
from rv_distributed.runtime.buffers import Bytes, read_range
from rv_distributed.storage import open_reader

F32 = npt.NDArray[np.float32]
Fetch = Callable[[ByteRange], Bytes]

#: The numbers of F8_E8M0, by their bits.
_POWERS_OF_2 = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))


class Decoder:
    """Decodes for one thread, and keeps the factors of the adapters that it is at."""

    def __init__(self) -> None:
        self._factors: dict[Operand, F32] = {}

    def keep_only(self, sources: Iterable[Source | None]) -> None:
        """Forget the factors of all other sources."""
        wanted = {factor for source in sources if isinstance(source, LowRank) for factor in source.factors()}
        for factor in self._factors.keys() - wanted:
            del self._factors[factor]

    def decode(self, source: Decoded, first: int, count: int, fetch: Fetch, into: Bytes) -> None:
        """Fill ``into`` with ``count`` elements of ``source.dtype`` from its element ``first``.

        ``fetch`` gives the bytes of a range, which may be gone at its next call.
        """
        if isinstance(source, BlockScaled):
            _dequantize(source, first, count, fetch, into)
        elif isinstance(source, Gathered):
            _gather(source, first, count, fetch, into)
        else:
            self._add_adapter(source, first, count, fetch, into)

    def _add_adapter(self, source: LowRank, first: int, count: int, fetch: Fetch, into: Bytes) -> None:
        from rv_distributed.kernels import low_rank

        values = into.view(np.float32)
        if source.base is not None:
            self._widen_base(source.base, source.first + first, count, fetch, values)
        top, bottom = source.rows_of(first, count)
        if source.is_transposed:
            left = self._factor(source.left, source.rank, source.rows, fetch).T[top:bottom]
            right = self._factor(source.right, source.columns, source.rank, fetch).T
        else:
            left = widened(fetch(source.ranges(first, count)[-1]), source.left.dtype).reshape(-1, source.rank)
            right = self._factor(source.right, source.rank, source.columns, fetch)
        low_rank.add_low_rank(
            np.ascontiguousarray(left),
            np.ascontiguousarray(right),
            np.float32(source.scale),
            source.first + first - top * source.columns,
            source.base is not None,
            np.empty(low_rank.STRIP, np.float32),
            values,
        )

    def _widen_base(self, base: Source, first: int, count: int, fetch: Fetch, values: F32) -> None:
        if isinstance(base, Operand):
            values[:] = widened(fetch(base.range_of(first, count)), base.dtype)
        elif base.dtype == "F32":
            self.decode(base, first, count, fetch, values.view(np.uint8))
        else:
            raw = np.empty(count * item_bytes(base.dtype), np.uint8)
            self.decode(base, first, count, fetch, raw)
            values[:] = widened(raw, base.dtype)

    def _factor(self, factor: Operand, rows: int, columns: int, fetch: Fetch) -> F32:
        if factor not in self._factors:
            self._factors[factor] = widened(fetch(factor.range_of(0, rows * columns)), factor.dtype)
        return self._factors[factor].reshape(rows, columns)


def widened(raw: Bytes, dtype: str) -> F32:
    """The elements of some bytes in float32, in memory of their own; exact."""
    if dtype == "F8_E8M0":
        return _POWERS_OF_2[raw]
    # Whatever the address: what is copied is aligned.
    raw = raw.copy()
    if dtype == "F32":
        return raw.view(np.float32)
    if dtype == "F16":
        with np.errstate(invalid="ignore"):
            return raw.view(np.float16).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _dequantize(source: BlockScaled, first: int, count: int, fetch: Fetch, into: Bytes) -> None:
    from rv_distributed.kernels import fp8

    weight, scales = map(fetch, source.ranges(first, count))
    fp8.dequantize(
        weight,
        widened(scales, source.scales.dtype),
        source.first + first,
        source.rows,
        source.columns,
        np.array(source.block, np.int64),
        into.view(np.float32),
    )


def _gather(source: Gathered, first: int, count: int, fetch: Fetch, into: Bytes) -> None:
    from rv_distributed.kernels import gather

    item = item_bytes(source.dtype)
    start = (source.first + first) * item
    found = zip(source.overlapping(first, count), source.ranges(first, count), strict=True)
    for (box, low, high), wanted in found:
        run, sizes, strides, place = _runs(box, source.shape)
        in_bytes = np.array([strides], np.int64).ravel() * item
        gather.copy_runs(
            fetch(wanted), low * item, high * item, run * item, sizes, in_bytes, place * item - start, into
        )


def _runs(box: Box, shape: tuple[int, ...]) -> tuple[int, npt.NDArray[np.int64], list[int], int]:
    """How a box lies in its tensor: the length of its runs of neighbours, sizes and strides of the dimensions before
    them, and the place of its first element; all in elements."""
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    place = sum(start * stride for start, stride in zip(box.starts, strides, strict=True))
    leading = len(shape)
    while leading and box.sizes[leading:] == shape[leading:]:
        leading -= 1
    return math.prod(box.sizes[leading:]), np.array(box.sizes[:leading], np.int64), strides[:leading], place


def read_source(source: Source, first: int, count: int) -> Bytes:
    """The bytes of some elements, of the source's dtype. Raises OSError."""

    def read(wanted: ByteRange) -> Bytes:
        with closing(open_reader(wanted.path)) as reader:
            return read_range(reader, wanted)

    if isinstance(source, Operand):
        return read(source.range_of(first, count))
    raw = np.empty(count * item_bytes(source.dtype), np.uint8)
    Decoder().decode(source, first, count, read, raw)
    return raw


def element_of(source: Source, index: int) -> float:
    """One element, whose dtype is one that arithmetic reads. Raises OSError."""
    raw = read_source(source, index, 1)
    return float(raw.view(np.float64)[0] if source.dtype == WIDE else widened(raw, source.dtype)[0])
