"""FP8 weights with a scale for each block: to float32, and back.

E4M3 as in the OCP's specification (and torch's float8_e4m3fn): 4 bits of exponent with a bias of 7, no infinity, NaN
where all bits below the sign are set, 448 the largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from rv_distributed.kernels.jit.common import FLOAT, I32, PLAIN, U8, U32, Array


@njit(**PLAIN)
def _from_e4m3(bits: Any) -> Any:
    # The exponents' biases differ by 120; multiplying makes subnormal numbers normal on the way.
    size = U32(U32(bits) & U32(0x7F))
    magnitude = FLOAT(U32(size << U32(20)).view(FLOAT) * FLOAT(2.0**120)).view(U32)
    if size == U32(0x7F):
        magnitude = U32(0x7FC00000)
    return U32(magnitude | U32(U32(U32(bits) & U32(0x80)) << U32(24))).view(FLOAT)


@njit(**PLAIN)
def _to_e4m3(value: Any) -> Any:
    """Rounded to nearest even; what is beyond 448 is 448, and infinity is NaN as NaN is."""
    bits = FLOAT(value).view(U32)
    sign = U32(U32(bits >> U32(24)) & U32(0x80))
    magnitude = U32(bits & U32(0x7FFFFFFF))
    if magnitude >= U32(0x7F800000):
        found = U32(0x7F)
    elif magnitude >= U32(0x43E00000):
        found = U32(0x7E)
    elif magnitude < U32(0x3C800000):
        # Subnormal: float32 itself rounds to multiples of 2⁻⁹ when it adds 2¹⁴.
        found = U32(FLOAT(magnitude.view(FLOAT) + FLOAT(16384.0)).view(U32) - U32(0x46800000))
    else:
        even = U32(U32(magnitude >> U32(20)) & U32(1))
        found = U32(U32(magnitude - U32(120 << 23) + U32(0x7FFFF) + even) >> U32(20))
    return U8(sign | found)


@njit(**PLAIN)
def _scale_run(raw: Array, scale: Any, into: Array) -> None:
    for i in range(into.size):
        into[i] = FLOAT(_from_e4m3(raw[i]) * scale)


def dequantize(raw: Array, scales: Array, first: int, rows: int, columns: int, block: Array, into: Array) -> None:
    """``RN32(q·s)`` of the elements ``raw`` (uint8), which begin at element ``first`` of a stack of matrices.

    ``scales`` (float32) are those of `BlockScaled.ranges`: rows of scales from the one of the first element on.
    ``block`` (int64) is its rows and columns; ``into`` (float32) is as long as ``raw``.
    """
    high, wide = block[0], block[1]
    down, across = -(-rows // high), -(-columns // wide)
    top = (first // columns) // rows * down + (first // columns) % rows // high
    done = 0
    while done < into.size:
        row, column = (first + done) // columns, (first + done) % columns
        at = (row // rows * down + row % rows // high - top) * across
        stop = min(into.size, done + columns - column)
        while done < stop:
            border = min(stop, done + wide - column % wide)
            _scale_run(raw[done:border], scales[at + column // wide], into[done:border])
            column += border - done
            done = border


@njit(**PLAIN)
def _largest(values: Array) -> Any:
    """The largest magnitude that is finite, as bits: in this order, too, are those that are not negative."""
    bits = values.view(U32)
    most = U32(0)
    for i in range(bits.size):
        magnitude = U32(bits[i] & U32(0x7FFFFFFF))
        most = U32(max(most, magnitude if magnitude < U32(0x7F800000) else U32(0)))
    return most


@njit(**PLAIN)
def _quantize_run(values: Array, forward: Any, scale: Any, into: Array, back: Array) -> None:
    for i in range(values.size):
        found = _to_e4m3(FLOAT(values[i] * forward))
        into[i] = found
        back[i] = FLOAT(_from_e4m3(found) * scale)


@njit(**PLAIN)
def _quantize_run_by_chance(values: Array, forward: Any, scale: Any, words: Array, into: Array, back: Array) -> None:
    """As `_quantize_run`, stochastically: the method is that of `rv_distributed.kernels.rounding`."""
    for i in range(values.size):
        scaled = FLOAT(values[i] * forward)
        found = _to_e4m3(scaled)
        magnitude = FLOAT(abs(scaled))
        if magnitude < FLOAT(448.0):
            # Neighbours are this power of 2 apart.
            exponent = max(I32(magnitude.view(U32) >> U32(23)) - I32(127 + 3), I32(-9))
            units = FLOAT(magnitude * U32(U32(127 - exponent) << U32(23)).view(FLOAT))
            whole = FLOAT(np.floor(units))
            signed = I32(I32(words[i]) >> I32(9))
            uniform = FLOAT(FLOAT(FLOAT(signed) * FLOAT(2.0**-23)) + FLOAT(0.5 + 2.0**-24))
            if FLOAT(units - whole) > uniform:
                whole = FLOAT(whole + FLOAT(1.0))
            # Their bits count up from 0 in units of the spacing, and on from each exponent's first.
            found = U8(U8(found & U8(0x80)) | U8(U32(whole) + U32(U32(exponent + 9) << U32(3))))
        into[i] = found
        back[i] = FLOAT(_from_e4m3(found) * scale)


def largest_of_blocks(values: Array, columns: int, wide: int, into: Array) -> None:
    """The largest finite magnitude of each block in a row of blocks (float32, whole rows)."""
    most = into.view(U32)
    for number in range(into.size):
        most[number] = U32(0)
        for start in range(number * wide, values.size, columns):
            found = _largest(values[start : start + min(wide, columns - number * wide)])
            most[number] = U32(max(most[number], found))


def quantize(
    values: Array, forward: Array, scales: Array, columns: int, wide: int, words: Array, into: Array, back: Array
) -> None:
    """A row of blocks as E4M3: ``values`` (float32) times ``forward`` of their block, rounded, into ``into`` (uint8).

    ``back`` (float32) gets the same dequantized with ``scales``. ``words`` (uint32) are those of stochastic rounding,
    one for each value, or empty for rounding to nearest.
    """
    for start in range(0, values.size, columns):
        for number in range(scales.size):
            low = start + number * wide
            high = min(low + wide, start + columns)
            run, made, again = values[low:high], into[low:high], back[low:high]
            if words.size:
                _quantize_run_by_chance(run, forward[number], scales[number], words[low:high], made, again)
            else:
                _quantize_run(run, forward[number], scales[number], made, again)
