"""The arithmetic and what is measured of it: one pass over memory.

A block is computed in strips so short that everything between reading the operands and the last sum stays in the first
cache. The bits are those that `rv_distributed.kernels.combine` specifies.
"""

from __future__ import annotations

from rv_distributed.kernels.jit.arithmetic import (
    add_scaled,
    add_scaled_fused,
    divide_and_scale,
    scale_add_and_narrow,
    scale_and_add,
    subtract,
)
from rv_distributed.kernels.jit.chance import fill_noise, narrow_by_chance
from rv_distributed.kernels.jit.common import DOUBLE, U32, WIDTHS, Array, aligned, copy, fill
from rv_distributed.kernels.jit.convert import narrow, widen
from rv_distributed.kernels.jit.measure import count_inexact, measure
from rv_distributed.kernels.jit.sums import add_sums_of_values
from rv_distributed.kernels.strips import INEXACT, NO_TENSOR, NOTHING, STRIP


def combine(
    arena: Array,
    target_at: int,
    target_code: int,
    vectors: Array,
    alphas: Array,
    after: Array,
    fused: bool,
    outs: Array,
    at: int,
    code: int,
    first_element: int,
    count: int,
    keys: Array,
    weighted: bool,
    level: int,
    scratch: Array,
    spare: Array,
    steps: Array,
    sums: Array,
    counts: Array,
) -> None:
    """Compute ``count`` elements from ``first_element`` of a tensor, in every output.

    In float32 or float64, which is the dtype of ``alphas``, ``after`` and ``scratch``.

    ``arena`` (bytes) holds the operands: the target at ``target_at``, or none if ``target_code`` is `NO_TENSOR`: then
    there is one vector and one output, and the output is the vector. ``vectors`` (int64) has a row ``at, code, at,
    code`` for plus and minus of each vector; a minus of the code `NO_TENSOR` is none. ``alphas`` has a row an
    output and a column a vector. ``after`` is empty, or has a row ``divisor, scale`` an output: then the
    vectors are added to each other, ``fused`` or not, divided, scaled, and added to the target, or are the output where
    there is none. ``outs`` (bytes, contiguous) has a row an output, which gets elements of dtype ``code`` from byte
    ``at``. ``keys`` (uint32) are those of stochastic rounding, or empty for rounding to nearest. ``weighted`` says what
    is measured as v: the weighted sum of the vectors, or the one that there is. The measures are added to ``sums``
    (float64) and ``counts`` (int64), which have a row an output. ``scratch`` has 3 rows and two for each
    output, ``spare`` (bytes) has 3 and ``steps`` (uint16) is one, all of at least `STRIP` elements.
    """
    width = WIDTHS[code]
    summed = after.shape[0] > 0
    by_chance = keys.size > 0 and width == 2
    for first in range(0, count, STRIP):
        n = min(STRIP, count - first)
        t, d, o = scratch[0, :n], scratch[1, :n], scratch[2, :n]
        low, high = at + first * width, at + (first + n) * width
        # What the output would be without any vector.
        base = spare[0, : n * width]
        if target_code == NO_TENSOR:
            fill(t, 0)
            fill(base, 0)
        else:
            size = WIDTHS[target_code]
            raw = aligned(arena, target_at + first * size, n, size, spare[1])
            widen(raw, target_code, t)
            if target_code == code:
                base = raw
            else:
                narrow(t, code, base)
        if vectors.shape[0] == 0:
            fill(d, 0)
            for k in range(outs.shape[0]):
                copy(t, scratch[3 + 2 * k, :n])
                fill(scratch[4 + 2 * k, :n], 0)
        for number in range(vectors.shape[0]):
            size = WIDTHS[vectors[number, 1]]
            widen(aligned(arena, vectors[number, 0] + first * size, n, size, spare[2]), vectors[number, 1], d)
            if vectors[number, 3] != NO_TENSOR:
                size = WIDTHS[vectors[number, 3]]
                raw = aligned(arena, vectors[number, 2] + first * size, n, size, spare[2])
                subtract(d, raw, vectors[number, 3])
            for k in range(outs.shape[0] if target_code != NO_TENSOR or summed else 0):
                acc, v, alpha = scratch[3 + 2 * k, :n], scratch[4 + 2 * k, :n], alphas[k, number]
                if weighted:
                    if number == 0:
                        fill(v, 0)
                    if alpha != 0 and fused:
                        add_scaled_fused(v, d, alpha)
                    elif alpha != 0:
                        add_scaled(v, d, alpha)
                if summed:
                    continue
                if alpha != 0 and number == vectors.shape[0] - 1 and not by_chance:
                    scale_add_and_narrow(t if number == 0 else acc, d, alpha, code, outs[k, low:high])
                elif number > 0 and alpha != 0:
                    add_scaled(acc, d, alpha)
                elif number == 0 and alpha != 0:
                    scale_and_add(t, d, alpha, acc)
                elif number == 0:
                    copy(t, acc)
        for k in range(outs.shape[0]):
            out = outs[k, low:high]
            acc = d if target_code == NO_TENSOR else scratch[3 + 2 * k, :n]
            if summed and vectors.shape[0] > 0:
                divide_and_scale(scratch[4 + 2 * k, :n], after[k, 0], after[k, 1])
                if target_code == NO_TENSOR:
                    acc = scratch[4 + 2 * k, :n]
                else:
                    scale_and_add(t, scratch[4 + 2 * k, :n], scratch.dtype.type(1), acc)
            if target_code == code and not alphas[k].any():
                copy(base, out)
            elif by_chance:
                narrow_by_chance(acc, code, out, first_element + first, keys, scratch[2].view(U32))
            elif summed or target_code == NO_TENSOR or vectors.shape[0] == 0 or alphas[k, -1] == 0:
                narrow(acc, code, out)
            v = scratch[4 + 2 * k, :n] if weighted else d
            alpha64 = 1.0 if weighted or vectors.shape[0] == 0 else DOUBLE(alphas[k, 0])
            measure(level, t, base, v, alpha64, out, code, first, o, steps[:n], sums[k], counts[k])
            if target_code == NO_TENSOR and level != NOTHING and not summed:
                widen(out, code, o)
                counts[k, INEXACT] += count_inexact(d, o)


def noise(first: int, keys: Array, into: Array) -> None:
    """The words of `fill_noise`, for what is rounded elsewhere."""
    fill_noise(first, keys, into)


def all_sums(t: Array, v: Array, out: Array, alpha: float, sums: Array) -> None:
    """The sums of `add_sums` over float32, for what is computed elsewhere."""
    for first in range(0, v.size, STRIP):
        last = min(first + STRIP, v.size)
        add_sums_of_values(t[first:last], v[first:last], out[first:last], alpha, sums)
