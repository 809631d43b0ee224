"""What a strip tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit

from rv_distributed.kernels.jit.common import F32, I16, I32, I64, PLAIN, U16, U32, U64, WIDTHS, Array
from rv_distributed.kernels.jit.convert import widen
from rv_distributed.kernels.jit.sums import add_squares, add_sums
from rv_distributed.kernels.strips import (
    ABSORBED,
    CHANGED,
    FIRST,
    FULL,
    INFINITE,
    NAN,
    NONZERO,
    NOTHING,
    OVERFLOWED,
    ULPS,
    ULPS_MAX,
    V_MAX_BITS,
)

#: The magnitude's bits of an infinity.
INFINITY: Final = (0x7F80, 0x7C00, 0x7F800000, 0x7FF0000000000000)
#: More steps than an integer of 64 bits can count are so many.
_MOST_STEPS: Final = 2**63 - 1


def _finding_steps(signed: Any, unsigned: Any, bits: int) -> Callable[..., tuple[Any, Any]]:
    magnitude, middle, sign = signed(2 ** (bits - 1) - 1), unsigned(2 ** (bits - 1)), signed(bits - 1)

    @njit(**PLAIN)
    def loop(target: Array, out: Array, steps: Array) -> tuple[Any, Any]:
        most = largest = unsigned(0)
        for i in range(steps.size):
            x, y = signed(target[i]), signed(out[i])
            x_size, y_size = signed(x & magnitude), signed(y & magnitude)
            largest = unsigned(max(largest, max(unsigned(x_size), unsigned(y_size))))
            # Two's complement, in place of sign and magnitude, makes one sequence of all numbers, with one zero; and
            # counted from its other end the differences need no sign.
            x_sign, y_sign = signed(x >> sign), signed(y >> sign)
            x_place = unsigned(unsigned(signed(signed(x_size ^ x_sign) - x_sign)) ^ middle)
            y_place = unsigned(unsigned(signed(signed(y_size ^ y_sign) - y_sign)) ^ middle)
            step = unsigned(max(x_place, y_place) - min(x_place, y_place))
            most = unsigned(max(most, step))
            steps[i] = U16(min(step, unsigned(0xFFFF)))
        return I64(min(U64(most), U64(_MOST_STEPS))), I64(largest)

    return loop  # type: ignore[no-any-return]


_find_steps16, _find_steps32, _find_steps64 = map(_finding_steps, (I16, I32, I64), (U16, U32, U64), (16, 32, 64))


@njit(**PLAIN)
def _find_steps(target: Array, out: Array, code: int, steps: Array) -> tuple[Any, Any]:
    """How many numbers of its dtype each element of ``out`` is away from that of ``target``; ``steps`` end where uint16
    does.

    Returns the most, and the largest magnitude of all elements, as bits.
    """
    if WIDTHS[code] == 2:
        return _find_steps16(target.view(U16), out.view(U16), steps)
    if code == F32:
        return _find_steps32(target.view(U32), out.view(U32), steps)
    return _find_steps64(target.view(U64), out.view(U64), steps)


@njit(**PLAIN)
def _take_out_nonfinite(
    t: Array, target: Array, v: Array, o: Array, out: Array, code: int, steps: Array, counts: Array
) -> Any:
    """Count the changes from or to NaN and infinity, between which and other numbers there are no steps, and set
    their steps to 0; returns the most of the others. Called where there are some, which is rare."""
    most, width = I64(0), WIDTHS[code]
    for i in range(steps.size):
        if np.isfinite(t[i]) and np.isfinite(o[i]):
            here = slice(i * width, (i + 1) * width)
            most = max(most, _find_steps(target[here], out[here], code, steps[i : i + 1])[0])
            continue
        if steps[i] != U16(0) and not (np.isnan(t[i]) and np.isnan(o[i])):
            counts[CHANGED] += 1
            # `_count_changes` will take it for one that is not changed.
            counts[ABSORBED] -= v[i] != 0
        steps[i] = U16(0)
    return most


def _counting_changes(signed: Any, magnitude: int) -> Callable[..., None]:
    @njit(**PLAIN)
    def loop(bits: Array, steps: Array, counts: Array) -> None:
        largest = nonzero = changed = absorbed = signed(0)
        for i in range(bits.size):
            # As integers, magnitudes have their order, with NaN above all.
            size = signed(bits[i] & signed(magnitude))
            largest = signed(max(largest, size))
            moves, moved = size != signed(0), steps[i] != U16(0)
            nonzero = signed(nonzero + signed(moves))
            changed = signed(changed + signed(moved))
            absorbed = signed(absorbed + signed(moves & (not moved)))
        counts[V_MAX_BITS] = max(counts[V_MAX_BITS], I64(largest))
        counts[NONZERO] += nonzero
        counts[CHANGED] += changed
        counts[ABSORBED] += absorbed

    return loop  # type: ignore[no-any-return]


_count_changes32, _count_changes64 = map(_counting_changes, (I32, I64), (2**31 - 1, 2**63 - 1))


@njit(**PLAIN)
def _count_changes(v: Array, steps: Array, counts: Array) -> None:
    """Largest magnitude and elements that are not 0, of v; elements that are changed, and that v could not change."""
    if v.itemsize == 4:
        _count_changes32(v.view(I32), steps, counts)
    else:
        _count_changes64(v.view(I64), steps, counts)


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


def _finding_largest(unsigned: Any, magnitude: int) -> Callable[..., Any]:
    @njit(**PLAIN)
    def loop(bits: Array) -> Any:
        largest = unsigned(0)
        for i in range(bits.size):
            largest = unsigned(max(largest, unsigned(bits[i] & unsigned(magnitude))))
        return I64(largest)

    return loop  # type: ignore[no-any-return]


_largest16, _largest32, _largest64 = map(_finding_largest, (U16, U32, U64), (2**15 - 1, 2**31 - 1, 2**63 - 1))


@njit(**PLAIN)
def _has_nonfinite(raw: Array, code: int) -> Any:
    if WIDTHS[code] == 2:
        return _largest16(raw.view(U16)) >= INFINITY[code]
    if code == F32:
        return _largest32(raw.view(U32)) >= INFINITY[code]
    return _largest64(raw.view(U64)) >= INFINITY[code]


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
    most, largest = _find_steps(target, out, code, steps)
    if largest >= INFINITY[code]:
        widen(out, code, o)
        _count_nonfinite(t, v, o, first, counts)
        most = _take_out_nonfinite(t, target, v, o, out, code, steps, counts)
    _count_changes(v, steps, counts)
    counts[ULPS_MAX] = max(counts[ULPS_MAX], most)
    if level == FULL:
        add_sums(t, v, out, code, alpha, sums)
        _count_steps(steps, counts[ULPS:])
    else:
        add_squares(t, v, sums)


@njit(**PLAIN)
def count_inexact(d: Array, o: Array) -> Any:
    inexact = 0
    for i in range(d.size):
        inexact += o[i] != d[i] and not (np.isnan(o[i]) and np.isnan(d[i]))
    return inexact
