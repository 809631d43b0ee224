"""Stochastic rounding: its random words, and the elements of 16 bits that it makes."""

from __future__ import annotations

import numpy as np
from numba import njit

from rv_distributed.kernels.jit.common import BF16, F16, FLOAT, I32, I64, PLAIN, U16, U32, Array
from rv_distributed.kernels.jit.convert import narrow


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
def narrow_by_chance(values: Array, code: int, raw: Array, first: int, keys: Array, words: Array) -> None:
    """As `narrow`, but stochastically, for the dtypes of 16 bits; ``first`` is the first element in its tensor, and
    ``words`` (uint32) is scratch for one more than the values.

    The methods, and the reasons for them, are those of `rv_distributed.kernels.rounding`.
    """
    narrow(values, code, raw)
    bits, out = values.view(U32), raw.view(U16)
    if code == BF16:
        # An even element has the lower half of a word, which comes first in memory, and the next one the upper half.
        fill_noise(first >> 1, keys, words[: (values.size >> 1) + 1])
        halves = words.view(U16)[first & 1 :]
        for i in range(values.size):
            if U32(bits[i] & U32(0x7FFFFFFF)) < U32(0x7F7F0000):
                out[i] = U16(U32(bits[i] + U32(halves[i])) >> U32(16))
    elif code == F16:
        fill_noise(first, keys, words[: values.size])
        for i in range(values.size):
            magnitude = FLOAT(abs(values[i]))
            if magnitude < FLOAT(65504.0):
                exponent = max(I32(U32(bits[i] & U32(0x7FFFFFFF)) >> U32(23)) - I32(127 + 10), I32(-24))
                scaled = FLOAT(magnitude * U32(U32(127 - exponent) << U32(23)).view(FLOAT))
                whole = FLOAT(np.floor(scaled))
                signed = I32(I32(words[i]) >> I32(9))
                uniform = FLOAT(FLOAT(FLOAT(signed) * FLOAT(2.0**-23)) + FLOAT(0.5 + 2.0**-24))
                if FLOAT(scaled - whole) > uniform:
                    whole = FLOAT(whole + FLOAT(1.0))
                # The neighbours' bits count up from 0 in units of the spacing, and on from each exponent's first.
                step = U32(U32(whole) + U32(U32(exponent + 24) << U32(10)))
                out[i] = U16(U32(U32(bits[i] >> U32(16)) & U32(0x8000)) | step)
