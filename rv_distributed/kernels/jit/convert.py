"""Elements to float32 or float64, which is exact, and back, rounded to nearest even."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from rv_distributed.kernels.jit.common import BF16, DOUBLE, F16, F32, FLOAT, I32, PLAIN, U16, U32, Array, Convert, copy


@njit(**PLAIN)
def from_bf16(bits: Any) -> Any:
    return U32(U32(bits) << U32(16)).view(FLOAT)


@njit(**PLAIN)
def from_f16(bits: Any) -> Any:
    # The exponents' biases differ by 112; multiplying makes subnormal numbers normal on the way.
    value = FLOAT(U32(U32(bits & U16(0x7FFF)) << U32(13)).view(FLOAT) * FLOAT(2.0**112))
    magnitude = value.view(U32)
    if value >= FLOAT(65536.0):
        magnitude = U32(magnitude | U32(0x7F800000))
    return U32(magnitude | U32(U32(bits & U16(0x8000)) << U32(16))).view(FLOAT)


@njit(**PLAIN)
def same(value: Any) -> Any:
    return value


@njit(**PLAIN)
def _to_odd(value: Any) -> Any:
    """The bits of a float32: the value itself, if it is one, or else the neighbour of it whose last bit is 1.

    Why, and by whom: `rv_distributed.kernels.rounding`. Of float32, LLVM leaves nothing of it.
    """
    near = FLOAT(value)
    magnitude, found = abs(DOUBLE(value)), abs(DOUBLE(near))
    bits = near.view(U32)
    away = I32(I32(magnitude > found) - I32(magnitude < found))
    # One step of the bits is one step of the magnitude; NaN is neither greater nor less, and stays.
    return U32(bits + U32(away * I32(~bits & U32(1))))


@njit(**PLAIN)
def to_bf16(value: Any) -> Any:
    bits = _to_odd(value)
    # Half a unit, or just less where the last bit is 0: what is larger carries into the upper half.
    half = U32(U32(0x7FFF) + U32(U32(bits >> U32(16)) & U32(1)))
    is_nan = U32(bits & U32(0x7FFFFFFF)) > U32(0x7F800000)
    return U16(0x7FC0) if is_nan else U16(U32(bits + half) >> U32(16))


@njit(**PLAIN)
def to_f16(value: Any) -> Any:
    bits = _to_odd(value)
    sign = U32(U32(bits >> U32(16)) & U32(0x8000))
    magnitude = U32(bits & U32(0x7FFFFFFF))
    if magnitude > U32(0x7F800000):
        half = U32(0x7E00)
    elif magnitude >= U32(0x47800000):
        half = U32(0x7C00)
    elif magnitude < U32(0x38800000):
        # Subnormal: float32 itself rounds to multiples of 2⁻²⁴ when it adds 0.5.
        half = U32(FLOAT(magnitude.view(FLOAT) + FLOAT(0.5)).view(U32) - U32(0x3F000000))
    else:
        even = U32(U32(magnitude >> U32(13)) & U32(1))
        half = U32(U32(magnitude - U32(112 << 23) + U32(0xFFF) + even) >> U32(13))
    return U16(sign | half)


def _converting(convert: Convert) -> Callable[..., None]:
    @njit(**PLAIN)
    def loop(source: Array, into: Array) -> None:
        for i in range(into.size):
            into[i] = convert(source[i])

    return loop  # type: ignore[no-any-return]


_widen_bf16, _widen_f16 = _converting(from_bf16), _converting(from_f16)
_narrow_to_bf16, _narrow_to_f16 = _converting(to_bf16), _converting(to_f16)


@njit(**PLAIN)
def widen(raw: Array, code: int, into: Array) -> None:
    """Values from the elements of ``raw``; exact, but of float64 in float32."""
    if code == BF16:
        _widen_bf16(raw.view(U16), into)
    elif code == F16:
        _widen_f16(raw.view(U16), into)
    elif code == F32:
        copy(raw.view(FLOAT), into)
    else:
        copy(raw.view(DOUBLE), into)


@njit(**PLAIN)
def narrow(values: Array, code: int, raw: Array) -> None:
    """The values rounded to nearest even, as elements of ``raw``."""
    if code == BF16:
        _narrow_to_bf16(values, raw.view(U16))
    elif code == F16:
        _narrow_to_f16(values, raw.view(U16))
    elif code == F32:
        copy(values, raw.view(FLOAT))
    else:
        copy(values, raw.view(DOUBLE))
