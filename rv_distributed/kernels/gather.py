"""Copying the elements of a box to their places in its tensor, compiled for the processor by Numba."""

from __future__ import annotations

from typing import Any, Final

from numba import njit

from rv_distributed.kernels.entry import PLAIN, Entry

Array = Any


@njit(**PLAIN)
def _copy(source: Array, into: Array) -> None:
    for i in range(into.size):
        into[i] = source[i]


def _copy_runs(
    raw: Array, low: int, high: int, run: int, sizes: Array, strides: Array, place: int, into: Array
) -> None:
    """Copy bytes ``low`` to ``high`` of a box, which are ``raw``, into a part of its tensor.

    A box is runs of ``run`` bytes, one after another. A run has an index in each of its leading dimensions: ``sizes``
    (int64) are theirs, ``strides`` (int64) those in the tensor, in bytes. ``place`` is where the box's first byte lies,
    counted from the first of ``into``; it may be negative.
    """
    done = low
    while done < high:
        number, inside = done // run, done % run
        count = min(run - inside, high - done)
        at = place + inside
        for dimension in range(sizes.size - 1, -1, -1):
            at += number % sizes[dimension] * strides[dimension]
            number //= sizes[dimension]
        _copy(raw[done - low : done - low + count], into[at : at + count])
        done += count


copy_runs: Final = Entry(_copy_runs)
