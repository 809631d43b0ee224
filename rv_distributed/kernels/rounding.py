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

#: Temporaries in float64 are made for this many elements at a time, to keep them few and in the caches.
_SLICE: Final = 1 << 15


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


class Rounder:
    """Rounding for one thread on one device, of at most ``block_elements`` at a time."""

    def __init__(self, arithmetic: Arithmetic, *, block_elements: int, device: torch.device) -> None:
        self._noise: Noise | None = None
        if arithmetic.rounding == "stochastic":
            words = max(block_elements // 2 + 1, min(block_elements, _SLICE))
            self._noise = Noise(arithmetic.seed, words=words, device=device)
            self._bits = torch.empty(block_elements, dtype=torch.int32, device=device)

    def round(self, values: Tensor, out: Tensor, *, name: str, first: int) -> None:
        """Fill ``out`` with ``values``, which are the elements from ``first`` of the tensor ``name``."""
        if self._noise is None or out.dtype not in _FORMATS:
            _to_nearest(values, out)
        elif values.dtype == torch.float32 and out.dtype == torch.bfloat16:
            self._to_bfloat16(values, out, self._noise.bits16(name, first, values.numel()))
        else:
            for start in range(0, values.numel(), _SLICE):
                part = values[start : start + _SLICE]
                words = self._noise.bits32(name, first + start, part.numel())
                _to_either(part, out[start : start + _SLICE], words)

    def _to_bfloat16(self, values: Tensor, out: Tensor, noise: Tensor) -> None:
        """A bfloat16 is the upper half of a float32, subnormal or not: noise added to the lower half carries into
        the upper one with just the probability that is asked for."""
        bits = self._bits[: values.numel()].copy_(noise)
        bits.bitwise_and_(0xFFFF).add_(values.view(torch.int32)).bitwise_right_shift_(16)
        out.view(torch.int16).copy_(bits)
        _correct_beyond(values, out)


def _to_either(values: Tensor, out: Tensor, words: Tensor) -> None:
    """By comparison of the words with what truncation leaves, both as fractions of one. All of this is exact.

    The probability is a multiple of 2⁻³², as near as one is: it is exact for float32 values from 2⁻³³ on in float16.
    """
    digits, lowest, _ = _FORMATS[out.dtype]
    wide = values.double()
    magnitude = wide.abs()
    exponent = (magnitude.view(torch.int64) >> 52) - 1023
    # Neighbours in the output's dtype are this power of two apart.
    spacing = torch.clamp(exponent - (digits - 1), min=lowest)
    scale = (1023 - spacing).bitwise_left_shift_(52).view(torch.float64)
    scaled = magnitude.mul_(scale)
    whole = scaled.floor()
    fraction = scaled.sub_(whole)
    # In the middle of one of 2³² equal parts of the numbers from 0 to 1.
    uniform = words.double().mul_(2.0**-32).add_(0.5 + 2.0**-33)
    rounded = whole.add_(uniform < fraction).div_(scale)
    out.copy_(rounded.copysign_(wide))
    _correct_beyond(values, out)


def _correct_beyond(values: Tensor, out: Tensor) -> None:
    """Round to nearest what is not within the finite numbers of the output's dtype."""
    top = _FORMATS[out.dtype].top
    low, high = torch.aminmax(values)
    if max(-low.item(), high.item()) < top:
        return
    beyond = ~(values.abs() < top)
    rest = values[beyond]
    rounded = torch.empty_like(rest, dtype=out.dtype)
    _to_nearest(rest, rounded)
    out[beyond] = rounded


def _to_nearest(values: Tensor, out: Tensor) -> None:
    if values.dtype == torch.float64 and out.dtype in _FORMATS:
        # torch converts by way of float32, which would round twice.
        for start in range(0, values.numel(), _SLICE):
            out[start : start + _SLICE].copy_(_to_odd(values[start : start + _SLICE]))
    else:
        out.copy_(values)


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
