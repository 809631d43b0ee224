"""Copying the elements of a box to their places in its tensor."""

from __future__ import annotations

from rv_distributed.kernels.jit.common import Array, copy


def copy_runs(raw: Array, low: int, high: int, run: int, sizes: Array, strides: Array, place: int, into: Array) -> None:
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
        copy(raw[done - low : done - low + count], into[at : at + count])
        done += count
