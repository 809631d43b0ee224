"""Low-rank adapters."""

from __future__ import annotations

from typing import Any

from numba import njit

from rv_distributed.kernels.jit.common import FLOAT, PLAIN, Array
from rv_distributed.kernels.low_rank import STRIP


@njit(**PLAIN)
def _add_products(
    a: Any, b: Any, c: Any, d: Any, of_a: Array, of_b: Array, of_c: Array, of_d: Array, to: Array
) -> None:
    """Four at a time, in their order, since reading and writing the sums would take longer than adding to them."""
    for j in range(to.size):
        total = FLOAT(to[j] + FLOAT(a * of_a[j]))
        total = FLOAT(total + FLOAT(b * of_b[j]))
        total = FLOAT(total + FLOAT(c * of_c[j]))
        to[j] = FLOAT(total + FLOAT(d * of_d[j]))


@njit(**PLAIN)
def _add_product(a: Any, of_a: Array, to: Array) -> None:
    for j in range(to.size):
        to[j] = FLOAT(to[j] + FLOAT(a * of_a[j]))


@njit(**PLAIN)
def _add_scaled(values: Array, scale: Any, to: Array) -> None:
    for j in range(to.size):
        to[j] = FLOAT(to[j] + FLOAT(scale * values[j]))


@njit(**PLAIN)
def _scale(values: Array, scale: Any, to: Array) -> None:
    for j in range(to.size):
        to[j] = FLOAT(scale * values[j])


def add_low_rank(left: Array, right: Array, scale: Any, first: int, has_base: bool, sums: Array, into: Array) -> None:
    """Add ``scale·(left @ right)`` to the elements ``into``, as `LowRank` says, or put it there without a base.

    ``left`` [rows, rank] and ``right`` [rank, columns] are float32, as ``scale`` is. ``into`` begins at element
    ``first`` of the first row of ``left``. ``sums`` is scratch for `STRIP` elements.
    """
    rank, columns = right.shape
    for start in range(0, columns, STRIP):
        stop = min(start + STRIP, columns)
        for row in range(left.shape[0]):
            # Where the row's strip begins in ``into``, which may begin and end in the middle of it.
            at = row * columns - first
            low, high = max(start, -at), min(stop, into.size - at)
            if low >= high:
                continue
            total = sums[: high - low]
            for j in range(total.size):
                total[j] = FLOAT(0)
            fours = rank // 4 * 4
            for k in range(0, fours, 4):
                _add_products(
                    left[row, k],
                    left[row, k + 1],
                    left[row, k + 2],
                    left[row, k + 3],
                    right[k, low:high],
                    right[k + 1, low:high],
                    right[k + 2, low:high],
                    right[k + 3, low:high],
                    total,
                )
            for k in range(fours, rank):
                _add_product(left[row, k], right[k, low:high], total)
            if has_base:
                _add_scaled(total, scale, into[at + low : at + high])
            else:
                _scale(total, scale, into[at + low : at + high])
