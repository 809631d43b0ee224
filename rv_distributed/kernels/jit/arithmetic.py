"""Differences, and scaled additions, in float32 or float64, as the values are.

Each operation is rounded by itself: Numba fuses and reorders nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit

from rv_distributed.kernels.jit.common import BF16, DOUBLE, F16, F32, FLOAT, PLAIN, U16, Array, Convert
from rv_distributed.kernels.jit.convert import from_bf16, from_f16, same, to_bf16, to_f16


def _subtracting(convert: Convert) -> Callable[..., None]:
    @njit(**PLAIN)
    def loop(values: Array, source: Array) -> None:
        for i in range(values.size):
            values[i] = values[i] - convert(source[i])

    return loop  # type: ignore[no-any-return]


_subtract_bf16, _subtract_f16, _subtract = map(_subtracting, (from_bf16, from_f16, same))


@njit(**PLAIN)
def subtract(values: Array, raw: Array, code: int) -> None:
    """Take the elements of ``raw`` from the values."""
    if code == BF16:
        _subtract_bf16(values, raw.view(U16))
    elif code == F16:
        _subtract_f16(values, raw.view(U16))
    elif code == F32:
        _subtract(values, raw.view(FLOAT))
    else:
        _subtract(values, raw.view(DOUBLE))


@njit(**PLAIN)
def add_scaled(values: Array, d: Array, alpha: float) -> None:
    """``values = RN(values + RN(alpha·d))``, in place: with one array in two roles, `scale_and_add` is no vectors."""
    for i in range(d.size):
        values[i] = values[i] + alpha * d[i]


@njit(**PLAIN)
def add_scaled_fused(values: Array, d: Array, alpha: float) -> None:
    """``values = RN(values + alpha·d)`` of float32: float64 holds every product of two. Of float64 as `add_scaled`."""
    for i in range(d.size):
        values[i] = DOUBLE(values[i]) + DOUBLE(alpha) * DOUBLE(d[i])


@njit(**PLAIN)
def divide_and_scale(values: Array, divisor: float, scale: float) -> None:
    for i in range(values.size):
        values[i] = (values[i] / divisor) * scale


def _scaling_and_adding(convert: Convert) -> Callable[..., None]:
    @njit(**PLAIN)
    def loop(values: Array, d: Array, alpha: float, into: Array) -> None:
        for i in range(d.size):
            into[i] = convert(values[i] + alpha * d[i])

    return loop  # type: ignore[no-any-return]


_scale_and_add_to_bf16, _scale_and_add_to_f16, scale_and_add = map(_scaling_and_adding, (to_bf16, to_f16, same))


@njit(**PLAIN)
def scale_add_and_narrow(values: Array, d: Array, alpha: float, code: int, raw: Array) -> None:
    """``RN(values + RN(alpha·d))`` rounded to nearest even, as elements of ``raw``."""
    if code == BF16:
        _scale_and_add_to_bf16(values, d, alpha, raw.view(U16))
    elif code == F16:
        _scale_and_add_to_f16(values, d, alpha, raw.view(U16))
    elif code == F32:
        scale_and_add(values, d, alpha, raw.view(FLOAT))
    else:
        scale_and_add(values, d, alpha, raw.view(DOUBLE))
