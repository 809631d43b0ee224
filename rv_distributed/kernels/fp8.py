"""FP8 weights with a scale for each block, compiled for the processor by Numba: to float32, and back.

E4M3 as in the OCP's specification (and torch's float8_e4m3fn): 4 bits of exponent with a bias of 7, no infinity, NaN
where all bits below the sign are set, 448 the largest.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from rv_distributed.kernels.entry import PLAIN, Entry

#: The largest number of E4M3.
LARGEST: Final = 448.0
_U8, _U32, _I32 = np.uint8, np.uint32, np.int32
_FLOAT = np.float32
Array = Any


@njit(**PLAIN)
def _from_e4m3(bits: Any) -> Any:
    # The exponents' biases differ by 120; multiplying makes subnormal numbers normal on the way.
    size = _U32(_U32(bits) & _U32(0x7F))
    magnitude = _FLOAT(_U32(size << _U32(20)).view(_FLOAT) * _FLOAT(2.0**120)).view(_U32)
    if size == _U32(0x7F):
        magnitude = _U32(0x7FC00000)
    return _U32(magnitude | _U32(_U32(_U32(bits) & _U32(0x80)) << _U32(24))).view(_FLOAT)


@njit(**PLAIN)
def _to_e4m3(value: Any) -> Any:
    """Rounded to nearest even; what is beyond 448 is 448, and infinity is NaN as NaN is."""
    bits = _FLOAT(value).view(_U32)
    sign = _U32(_U32(bits >> _U32(24)) & _U32(0x80))
    magnitude = _U32(bits & _U32(0x7FFFFFFF))
    if magnitude >= _U32(0x7F800000):
        found = _U32(0x7F)
    elif magnitude >= _U32(0x43E00000):
        found = _U32(0x7E)
    elif magnitude < _U32(0x3C800000):
        # Subnormal: float32 itself rounds to multiples of 2⁻⁹ when it adds 2¹⁴.
        found = _U32(_FLOAT(magnitude.view(_FLOAT) + _FLOAT(16384.0)).view(_U32) - _U32(0x46800000))
    else:
        even = _U32(_U32(magnitude >> _U32(20)) & _U32(1))
        found = _U32(_U32(magnitude - _U32(120 << 23) + _U32(0x7FFFF) + even) >> _U32(20))
    return _U8(sign | found)


@njit(**PLAIN)
def _scale_run(raw: Array, scale: Any, into: Array) -> None:
    for i in range(into.size):
        into[i] = _FLOAT(_from_e4m3(raw[i]) * scale)


def _dequantize(raw: Array, scales: Array, first: int, rows: int, columns: int, block: Array, into: Array) -> None:
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
    bits = values.view(_U32)
    most = _U32(0)
    for i in range(bits.size):
        magnitude = _U32(bits[i] & _U32(0x7FFFFFFF))
        most = _U32(max(most, magnitude if magnitude < _U32(0x7F800000) else _U32(0)))
    return most


@njit(**PLAIN)
def _quantize_run(values: Array, forward: Any, scale: Any, into: Array, back: Array) -> None:
    for i in range(values.size):
        found = _to_e4m3(_FLOAT(values[i] * forward))
        into[i] = found
        back[i] = _FLOAT(_from_e4m3(found) * scale)


@njit(**PLAIN)
def _quantize_run_by_chance(values: Array, forward: Any, scale: Any, words: Array, into: Array, back: Array) -> None:
    """As `_quantize_run`, stochastically: the method is that of `rv_distributed.kernels.rounding`."""
    for i in range(values.size):
        scaled = _FLOAT(values[i] * forward)
        found = _to_e4m3(scaled)
        magnitude = _FLOAT(abs(scaled))
        if magnitude < _FLOAT(448.0):
            # Neighbours are this power of 2 apart.
            exponent = max(_I32(magnitude.view(_U32) >> _U32(23)) - _I32(127 + 3), _I32(-9))
            units = _FLOAT(magnitude * _U32(_U32(127 - exponent) << _U32(23)).view(_FLOAT))
            whole = _FLOAT(np.floor(units))
            signed = _I32(_I32(words[i]) >> _I32(9))
            uniform = _FLOAT(_FLOAT(_FLOAT(signed) * _FLOAT(2.0**-23)) + _FLOAT(0.5 + 2.0**-24))
            if _FLOAT(units - whole) > uniform:
                whole = _FLOAT(whole + _FLOAT(1.0))
            # Their bits count up from 0 in units of the spacing, and on from each exponent's first.
            found = _U8(_U8(found & _U8(0x80)) | _U8(_U32(whole) + _U32(_U32(exponent + 9) << _U32(3))))
        into[i] = found
        back[i] = _FLOAT(_from_e4m3(found) * scale)


def _largest_of_blocks(values: Array, columns: int, wide: int, into: Array) -> None:
    """The largest finite magnitude of each block in a row of blocks (float32, whole rows)."""
    most = into.view(_U32)
    for number in range(into.size):
        most[number] = _U32(0)
        for start in range(number * wide, values.size, columns):
            found = _largest(values[start : start + min(wide, columns - number * wide)])
            most[number] = _U32(max(most[number], found))


def _quantize(
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


dequantize: Final = Entry(_dequantize)
largest_of_blocks: Final = Entry(_largest_of_blocks)
quantize: Final = Entry(_quantize)
