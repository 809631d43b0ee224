"""The one rounding at the end: from float32 or float64 to the output's dtype, to nearest even or stochastically.

Stochastic rounding takes a value between two neighbours x < y of the dtype to y with probability
(value − x)/(y − x), so that its expectation is the value; values that the dtype holds stay as they are (Croci et
al., "Stochastic rounding: implementation, error analysis and applications", R. Soc. Open Sci. 2022). Beyond the
largest finite number there is nothing to choose from: overflow, infinity and NaN are those of rounding to nearest.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from rv_distributed.kernels.noise import Noise
from rv_distributed.recipe import Arithmetic


class _Format(NamedTuple):
    """A dtype of 16 bits."""

    digits: int
    """Of the significand, in binary and with the implicit one."""
    lowest: int
    """Exponent of the smallest subnormal number: all others are multiples of it."""
    top: float
    """The largest finite number."""


_FORMATS: Final = {
    torch.bfloat16: _Format(8, -133, torch.finfo(torch.bfloat16).max),
    torch.float16: _Format(11, -24, torch.finfo(torch.float16).max),
}


class _Layout(NamedTuple):
    """How a dtype that is computed in lies in memory, and what is random in it."""

    integers: torch.dtype
    """Of the same size."""
    stored: int
    """Bits of the significand that are stored."""
    bias: int
    """Of the exponent."""
    random_bits: int
    """Of a random number: with one half of the last added, the dtype still holds it."""


_LAYOUTS: Final = {
    torch.float32: _Layout(torch.int32, 23, 127, 23),
    torch.float64: _Layout(torch.int64, 52, 1023, 32),
}


class Rounder:
    """Rounding for one thread on one device, of at most ``block_elements`` at a time."""

    def __init__(self, arithmetic: Arithmetic, *, block_elements: int, device: torch.device) -> None:
        self._noise: Noise | None = None
        if arithmetic.rounding == "stochastic":
            self._noise = Noise(arithmetic.seed, words=block_elements + 1, device=device)
            self._bits = torch.empty(block_elements, dtype=torch.int32, device=device)

    def round(self, values: Tensor, out: Tensor, *, name: str, first: int) -> None:
        """Fill ``out`` with ``values``, which are the elements from ``first`` of the tensor ``name``."""
        if self._noise is None or out.dtype not in _FORMATS:
            to_nearest(values, out)
        elif values.dtype == torch.float32 and out.dtype == torch.bfloat16:
            self._to_bfloat16(values, out, self._noise.bits16(name, first, values.numel()))
        else:
            _by_comparison(values, out, self._noise.bits32(name, first, values.numel()))

    def _to_bfloat16(self, values: Tensor, out: Tensor, noise: Tensor) -> None:
        """A bfloat16 is the upper half of a float32, subnormal or not: noise added to the lower half carries into
        the upper one with just the probability that is asked for."""
        bits = self._bits[: values.numel()].copy_(noise)
        bits.bitwise_and_(0xFFFF).add_(values.view(torch.int32)).bitwise_right_shift_(16)
        out.view(torch.int16).copy_(bits)
        _correct_beyond(values, out)


def _by_comparison(values: Tensor, out: Tensor, words: Tensor) -> None:
    """What truncation leaves, as a fraction of the distance to the next number, is compared with a random one.

    All of this is exact but for the number of random bits: the probability is the nearest multiple of 2⁻²³ in float32
    and of 2⁻³² in float64, which is the fraction itself for every float32 from float16's smallest number on.
    """
    digits, lowest, _ = _FORMATS[out.dtype]
    integers, stored, bias, random_bits = _LAYOUTS[values.dtype]
    magnitude = values.abs()
    exponent = magnitude.view(integers).bitwise_right_shift(stored).sub_(bias)
    # Neighbours in the output's dtype are this power of two apart.
    spacing = exponent.sub_(digits - 1).clamp_(min=lowest)
    scale = spacing.neg_().add_(bias).bitwise_left_shift_(stored).view(values.dtype)
    scaled = magnitude.mul_(scale)
    whole = scaled.floor()
    fraction = scaled.sub_(whole)
    # In the middle of one of the 2ᵇⁱᵗˢ equal parts between 0 and 1.
    uniform = words.bitwise_right_shift(32 - random_bits).to(values.dtype)
    uniform.mul_(2.0**-random_bits).add_(0.5 + 2.0 ** -(random_bits + 1))
    # 1 where the fraction is larger, which it is in a rounded difference too; else 0.
    up = fraction.sub_(uniform).ceil_()
    out.copy_(whole.add_(up).div_(scale).copysign_(values))
    _correct_beyond(values, out)


def _correct_beyond(values: Tensor, out: Tensor) -> None:
    """Round to nearest what is not within the finite numbers of the output's dtype."""
    # Without a look at whether there is any, for which a GPU would have to be waited for.
    rounded = to_nearest(values, torch.empty_like(out))
    out.copy_(torch.where(values.abs() < _FORMATS[out.dtype].top, out, rounded))


def to_nearest(values: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` with ``values`` in its dtype, rounded to nearest even; returns it."""
    # From float64 torch converts to 16 bits by way of float32, which would round twice.
    is_twice = values.dtype == torch.float64 and out.dtype in _FORMATS
    return out.copy_(_to_odd(values) if is_twice else values)


def _to_odd(values: Tensor) -> Tensor:
    """Float64 rounded to odd in float32: of the two neighbours of what is not exact, the one whose last bit is 1.

    Rounding that to nearest, in a dtype with at least two digits less, gives what one rounding would (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans.
    Comput. 57(4), 2008).
    """
    near = values.float()
    magnitude, found = values.abs(), near.double().abs()
    away = (magnitude > found).int() - (magnitude < found).int()
    bits = near.view(torch.int32)
    # One step of the bits is one step of the magnitude; NaN is neither greater nor less, and stays.
    bits += away * (~bits & 1)
    return near
