"""Stochastic rounding: its random words, and the elements of 16 bits that it makes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from rv_distributed.kernels.jit.common import BF16, DOUBLE, I32, I64, PLAIN, U16, U32, Array
from rv_distributed.kernels.jit.convert import narrow

#: The largest finite numbers.
_TOP_BF16: Final = (2 - 2.0**-7) * 2.0**127
_TOP_F16: Final = 65504.0


@njit(**PLAIN)
def _fill_words(first: int, key: int, other_key: int, into: Array) -> None:
    start = U32(first & 0xFFFFFFFF)
    for i in range(into.size):
        x = U32(U32(start + U32(i)) + key)
        x = U32(U32(x ^ U32(x >> U32(17))) * U32(0xED5AD4BB))
        x = U32(x ^ other_key)
        x = U32(U32(x ^ U32(x >> U32(11))) * U32(0xAC4C1B51))
        x = U32(U32(x ^ U32(x >> U32(15))) * U32(0x31848BAB))
        into[i] = U32(x ^ U32(x >> U32(14)))


@njit(**PLAIN)
def fill_noise(first: int, keys: Array, into: Array) -> None:
    """The words of `rv_distributed.kernels.noise` from index ``first`` on; the keys change with its upper half."""
    border = ((I64(keys[4]) | I64(keys[5]) << 32) + 1) << 32
    before = min(max(border - first, 0), into.size)
    _fill_words(first, keys[0], keys[1], into[:before])
    _fill_words(first + before, keys[2], keys[3], into[before:])


@njit(**PLAIN)
def _narrow_by_comparison(
    values: Array, words: Array, random_bits: int, digits: int, lowest: int, top: float, out: Array
) -> None:
    unit = I64((1023 - random_bits) << 52).view(DOUBLE)
    for i in range(values.size):
        value = DOUBLE(values[i])
        magnitude = DOUBLE(abs(value))
        if magnitude < top:
            # Neighbours are this power of 2 apart.
            exponent: Any = max((magnitude.view(I64) >> 52) - (1023 + digits - 1), lowest)
            scaled = magnitude * I64((1023 - exponent) << 52).view(DOUBLE)
            whole = np.floor(scaled)
            if scaled - whole > DOUBLE(I32(words[i]) >> (32 - random_bits)) * unit + (0.5 + unit / 2):
                whole += 1.0
            # The neighbours' bits count up from 0 in units of the spacing, and on from each exponent's first.
            step = I64(whole) + ((exponent - lowest) << (digits - 1))
            out[i] = U16(((value.view(I64) >> 48) & 0x8000) | step)


@njit(**PLAIN)
def narrow_by_chance(values: Array, code: int, raw: Array, first: int, keys: Array, words: Array) -> None:
    """As `narrow`, but stochastically, for the dtypes of 16 bits; ``first`` is the first element in its tensor, and
    ``words`` (uint32) is scratch for one more than the values.

    The methods, and the reasons for them, are those of `rv_distributed.kernels.rounding`.
    """
    narrow(values, code, raw)
    out = raw.view(U16)
    if code == BF16 and values.itemsize == 4:
        bits = values.view(U32)
        # An even element has the lower half of a word, which comes first in memory, and the next one the upper half.
        fill_noise(first >> 1, keys, words[: (values.size >> 1) + 1])
        halves = words.view(U16)[first & 1 :]
        for i in range(values.size):
            if U32(bits[i] & U32(0x7FFFFFFF)) < U32(0x7F7F0000):
                out[i] = U16(U32(bits[i] + U32(halves[i])) >> U32(16))
        return
    fill_noise(first, keys, words[: values.size])
    random_bits = 23 if values.itemsize == 4 else 32
    if code == BF16:
        _narrow_by_comparison(values, words, random_bits, 8, -133, _TOP_BF16, out)
    else:
        _narrow_by_comparison(values, words, random_bits, 11, -24, _TOP_F16, out)
