"""What a strip tells. Only in the sums may operations be fused and reordered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit

from rv_distributed.kernels.jit.common import (
    BF16,
    DOUBLE,
    F16,
    F32,
    FLOAT,
    I16,
    I32,
    I64,
    PLAIN,
    U16,
    U32,
    Array,
    Convert,
)
from rv_distributed.kernels.jit.convert import as_f32, from_bf16, from_f16, widen
from rv_distributed.kernels.strips import (
    ABSORBED,
    CHANGED,
    ERROR_SQ,
    FIRST,
    FULL,
    INFINITE,
    MOVED_V,
    NAN,
    NONZERO,
    NOTHING,
    OVERFLOWED,
    T_SQ,
    ULPS,
    ULPS_MAX,
    V_MAX_BITS,
    V_SQ,
    V_T,
)

#: The magnitude's bits of an infinity.
INFINITY: Final = (0x7F80, 0x7C00, 0x7F800000)
_SUMS: Final[dict[str, Any]] = {**PLAIN, "fastmath": {"reassoc", "contract", "nsz"}}


def _adding_sums(convert: Convert) -> Callable[..., None]:
    @njit(**_SUMS)
    def loop(t: Array, v: Array, out: Array, alpha: float, sums: Array) -> None:
        v_sq = t_sq = v_t = moved_v = error_sq = 0.0
        for i in range(v.size):
            x, y = DOUBLE(v[i]), DOUBLE(t[i])
            moved = DOUBLE(convert(out[i])) - y
            error = moved - alpha * x
            v_sq += x * x
            t_sq += y * y
            v_t += x * y
            moved_v += moved * x
            error_sq += error * error
        sums[V_SQ] += v_sq
        sums[T_SQ] += t_sq
        sums[V_T] += v_t
        sums[MOVED_V] += moved_v
        sums[ERROR_SQ] += error_sq

    return loop  # type: ignore[no-any-return]


_add_sums_bf16, _add_sums_f16, add_sums_f32 = map(_adding_sums, (from_bf16, from_f16, as_f32))


@njit(**PLAIN)
def add_sums(t: Array, v: Array, out: Array, code: int, alpha: float, sums: Array) -> None:
    """All sums, in float64, in which every product of two float32 is exact."""
    if code == BF16:
        _add_sums_bf16(t, v, out.view(U16), alpha, sums)
    elif code == F16:
        _add_sums_f16(t, v, out.view(U16), alpha, sums)
    else:
        add_sums_f32(t, v, out.view(FLOAT), alpha, sums)


@njit(**_SUMS)
def _add_squares(t: Array, v: Array, sums: Array) -> None:
    v_sq = t_sq = 0.0
    for i in range(v.size):
        v_sq += DOUBLE(v[i]) * DOUBLE(v[i])
        t_sq += DOUBLE(t[i]) * DOUBLE(t[i])
    sums[V_SQ] += v_sq
    sums[T_SQ] += t_sq


@njit(**PLAIN)
def _find_steps16(target: Array, out: Array, steps: Array) -> tuple[Any, Any]:
    """How many numbers of a 16-bit dtype each element of ``out`` is away from that of ``target``.

    Returns the most, and the largest magnitude of all elements, as bits.
    """
    most = largest = U16(0)
    for i in range(steps.size):
        x, y = I16(target[i]), I16(out[i])
        x_size, y_size = I16(x & I16(0x7FFF)), I16(y & I16(0x7FFF))
        largest = U16(max(largest, max(U16(x_size), U16(y_size))))
        # Two's complement, in place of sign and magnitude, makes one sequence of all numbers, with one zero; and
        # counted from its other end the differences need no sign.
        x_sign, y_sign = I16(x >> I16(15)), I16(y >> I16(15))
        x_place = U16(U16(I16(I16(x_size ^ x_sign) - x_sign)) ^ U16(0x8000))
        y_place = U16(U16(I16(I16(y_size ^ y_sign) - y_sign)) ^ U16(0x8000))
        steps[i] = U16(max(x_place, y_place) - min(x_place, y_place))
        most = U16(max(most, steps[i]))
    return I64(most), I64(largest)


@njit(**PLAIN)
def _find_steps32(target: Array, out: Array, steps: Array) -> tuple[Any, Any]:
    """As `_find_steps16`, of float32; ``steps`` end where uint16 does."""
    most = largest = U32(0)
    for i in range(steps.size):
        x, y = I32(target[i]), I32(out[i])
        x_size, y_size = I32(x & I32(0x7FFFFFFF)), I32(y & I32(0x7FFFFFFF))
        largest = U32(max(largest, max(U32(x_size), U32(y_size))))
        x_sign, y_sign = I32(x >> I32(31)), I32(y >> I32(31))
        x_place = U32(U32(I32(I32(x_size ^ x_sign) - x_sign)) ^ U32(0x80000000))
        y_place = U32(U32(I32(I32(y_size ^ y_sign) - y_sign)) ^ U32(0x80000000))
        step = U32(max(x_place, y_place) - min(x_place, y_place))
        most = U32(max(most, step))
        steps[i] = U16(min(step, U32(0xFFFF)))
    return I64(most), I64(largest)


@njit(**PLAIN)
def _place(value: float) -> Any:
    """The place of a float32 in the sequence of all of them."""
    bits = I64(FLOAT(value).view(U32))
    return -(bits & 0x7FFFFFFF) if bits >> 31 else bits


@njit(**PLAIN)
def _take_out_nonfinite(t: Array, v: Array, o: Array, steps: Array, counts: Array) -> Any:
    """Count the changes from or to NaN and infinity, between which and other numbers there are no steps, and set
    their steps to 0; returns the most of the others. Called where there are some, which is rare."""
    most = I64(0)
    for i in range(steps.size):
        if np.isfinite(t[i]) and np.isfinite(o[i]):
            cut_off = steps[i] == U16(0xFFFF)
            most = max(most, abs(_place(t[i]) - _place(o[i])) if cut_off else I64(steps[i]))
            continue
        if steps[i] != U16(0) and not (np.isnan(t[i]) and np.isnan(o[i])):
            counts[CHANGED] += 1
            # `_count_changes` will take it for one that is not changed.
            counts[ABSORBED] -= v[i] != FLOAT(0)
        steps[i] = U16(0)
    return most


@njit(**PLAIN)
def _count_changes(v: Array, steps: Array, counts: Array) -> None:
    """Largest magnitude and elements that are not 0, of v; elements that are changed, and that v could not change."""
    bits = v.view(I32)
    largest = nonzero = changed = absorbed = I32(0)
    for i in range(v.size):
        # As integers, magnitudes have their order, with NaN above all.
        size = I32(bits[i] & I32(0x7FFFFFFF))
        largest = I32(max(largest, size))
        moves, moved = size != I32(0), steps[i] != U16(0)
        nonzero = I32(nonzero + I32(moves))
        changed = I32(changed + I32(moved))
        absorbed = I32(absorbed + I32(moves & (not moved)))
    counts[V_MAX_BITS] = max(counts[V_MAX_BITS], I64(largest))
    counts[NONZERO] += nonzero
    counts[CHANGED] += changed
    counts[ABSORBED] += absorbed


@njit(**PLAIN)
def _count_steps(steps: Array, ulps: Array) -> None:
    """How many are at least 1, 2, 3, 5, 9, 17, 65 and 257."""
    a = b = c = d = e = f = g = h = U16(0)
    for i in range(steps.size):
        step = steps[i]
        a = U16(a + U16(step >= U16(1)))
        b = U16(b + U16(step >= U16(2)))
        c = U16(c + U16(step >= U16(3)))
        d = U16(d + U16(step >= U16(5)))
        e = U16(e + U16(step >= U16(9)))
        f = U16(f + U16(step >= U16(17)))
        g = U16(g + U16(step >= U16(65)))
        h = U16(h + U16(step >= U16(257)))
    for place, count in enumerate((a, b, c, d, e, f, g, h)):
        ulps[place] += count


@njit(**PLAIN)
def _has_nonfinite(raw: Array, code: int) -> Any:
    if code == F32:
        bits32 = raw.view(U32)
        top32 = U32(0)
        for i in range(bits32.size):
            top32 = U32(max(top32, U32(bits32[i] & U32(0x7FFFFFFF))))
        return top32 >= U32(INFINITY[F32])
    bits = raw.view(U16)
    top = U16(0)
    for i in range(bits.size):
        top = U16(max(top, U16(bits[i] & U16(0x7FFF))))
    return top >= U16(INFINITY[code])


@njit(**PLAIN)
def _count_nonfinite(t: Array, v: Array, o: Array, first: int, counts: Array) -> None:
    """Called where there are some, which is rare."""
    for i in range(o.size):
        if np.isfinite(o[i]):
            continue
        if counts[NAN] + counts[INFINITE] == 0:
            counts[FIRST] = first + i
        if np.isnan(o[i]):
            counts[NAN] += 1
        else:
            counts[INFINITE] += 1
            if np.isfinite(t[i]) and np.isfinite(v[i]):
                counts[OVERFLOWED] += 1


@njit(**PLAIN)
def measure(
    level: int,
    t: Array,
    target: Array,
    v: Array,
    alpha: float,
    out: Array,
    code: int,
    first: int,
    o: Array,
    steps: Array,
    sums: Array,
    counts: Array,
) -> None:
    """Add what one strip tells.

    ``t`` is the target, ``target`` the same as raw elements of the dtype ``code``, as ``out`` is. ``first`` is the
    strip's first element, in the block; ``o`` and ``steps`` are scratch.
    """
    if level == NOTHING:
        if _has_nonfinite(out, code):
            widen(out, code, o)
            _count_nonfinite(t, v, o, first, counts)
        return
    if code == F32:
        most, largest = _find_steps32(target.view(U32), out.view(U32), steps)
    else:
        most, largest = _find_steps16(target.view(U16), out.view(U16), steps)
    if largest >= INFINITY[code]:
        widen(out, code, o)
        _count_nonfinite(t, v, o, first, counts)
        most = _take_out_nonfinite(t, v, o, steps, counts)
    _count_changes(v, steps, counts)
    counts[ULPS_MAX] = max(counts[ULPS_MAX], most)
    if level == FULL:
        add_sums(t, v, out, code, alpha, sums)
        _count_steps(steps, counts[ULPS:])
    else:
        _add_squares(t, v, sums)


@njit(**PLAIN)
def count_inexact(d: Array, o: Array) -> Any:
    inexact = 0
    for i in range(d.size):
        inexact += o[i] != d[i] and not (np.isnan(o[i]) and np.isnan(d[i]))
    return inexact
