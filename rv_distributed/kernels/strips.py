"""The arithmetic and what is measured of it, compiled for the processor by Numba: the fast path.

One pass over memory. A block is computed in strips so short that everything between reading the operands and the
last sum stays in the first cache. The bits are those that `rv_distributed.kernels.combine` specifies: Numba neither
fuses nor reorders floating-point operations, but where `_SUMS` lets it, which is in the sums of the measures only.

Operands are raw bytes and the code of a dtype, so that one compilation serves every mixture of them. The machine code
is kept between processes, in Numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit

#: Codes of dtypes, by their safetensors names.
CODES: Final = {"BF16": 0, "F16": 1, "F32": 2}
NO_TENSOR: Final = -1
#: Elements of a strip.
STRIP: Final = 2048
#: How much is measured.
NOTHING, BASIC, FULL = 0, 1, 2
#: Columns of sums.
V_SQ, T_SQ, V_T, MOVED_V, ERROR_SQ, SUMS = range(6)
#: Columns of counts; the last is the first of `ULPS`.
V_MAX_BITS, NONZERO, CHANGED, ABSORBED, ULPS_MAX, INEXACT, OVERFLOWED, NAN, INFINITE, FIRST, ULPS = range(11)
COUNTS: Final = ULPS + 8

_BF16, _F16, _F32 = 0, 1, 2
_WIDTHS: Final = (2, 2, 4)
#: The magnitude's bits of an infinity.
_INFINITY: Final = (0x7F80, 0x7C00, 0x7F800000)

_U8, _U16, _U32 = np.uint8, np.uint16, np.uint32
_I16, _I32, _I64 = np.int16, np.int32, np.int64
_FLOAT, _DOUBLE = np.float32, np.float64
Array = Any

_PLAIN: Final[dict[str, Any]] = {"nogil": True, "error_model": "numpy"}
_SUMS: Final[dict[str, Any]] = {**_PLAIN, "fastmath": {"reassoc", "contract", "nsz"}}


class _Entry:
    """A function that is compiled when it is first called, or taken from Numba's cache.

    The cache is a folder beside this file, or in the user's own, or nowhere; it may be full, or damaged by a power cut.
    None of that is a reason to fail: then the machine code is made anew, and not kept.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._ready = False
        try:
            self._compiled = njit(cache=True, **_PLAIN)(function)
        except RuntimeError:
            self._compiled = njit(**_PLAIN)(function)

    def __call__(self, *args: object) -> None:
        if self._ready:
            self._compiled(*args)
            return
        try:
            self._compiled(*args)
        except Exception:
            # Nothing has run yet: what is compiled raises no exception.
            self._compiled = njit(**_PLAIN)(self._function)
            self._compiled(*args)
        self._ready = True


@njit(**_PLAIN)
def _copy(source: Array, into: Array) -> None:
    # Numba compiles an assignment to a slice four times as long, for the sake of its error messages.
    for i in range(into.size):
        into[i] = source[i]


@njit(**_PLAIN)
def _fill(into: Array, value: int) -> None:
    for i in range(into.size):
        into[i] = value


@njit(**_PLAIN)
def _aligned(raw: Array, at: int, count: int, width: int, spare: Array) -> Array:
    """``count`` elements of ``raw`` from byte ``at``: in place, or in ``spare`` where they lie at odd addresses."""
    if at % width == 0:
        return raw[at : at + count * width]
    into = spare[: count * width]
    _copy(raw[at : at + count * width], into)
    return into


@njit(**_PLAIN)
def _widen(raw: Array, code: int, into: Array) -> None:
    """Float32 from the elements of ``raw``; exact."""
    bits = into.view(_U32)
    if code == _BF16:
        source = raw.view(_U16)
        for i in range(into.size):
            bits[i] = _U32(_U32(source[i]) << _U32(16))
    elif code == _F16:
        source = raw.view(_U16)
        for i in range(into.size):
            # The exponents' biases differ by 112; multiplying makes subnormal numbers normal on the way.
            value = _FLOAT(_U32(_U32(source[i] & _U16(0x7FFF)) << _U32(13)).view(_FLOAT) * _FLOAT(2.0**112))
            magnitude = value.view(_U32)
            if value >= _FLOAT(65536.0):
                magnitude = _U32(magnitude | _U32(0x7F800000))
            bits[i] = _U32(magnitude | _U32(_U32(source[i] & _U16(0x8000)) << _U32(16)))
    else:
        _copy(raw.view(_FLOAT), into)


@njit(**_PLAIN)
def _narrow(values: Array, code: int, raw: Array) -> None:
    """The values rounded to nearest even, as elements of ``raw``."""
    bits = values.view(_U32)
    if code == _BF16:
        out = raw.view(_U16)
        for i in range(values.size):
            # Half a unit, or just less where the last bit is 0: what is larger carries into the upper half.
            half = _U32(_U32(0x7FFF) + _U32(_U32(bits[i] >> _U32(16)) & _U32(1)))
            is_nan = _U32(bits[i] & _U32(0x7FFFFFFF)) > _U32(0x7F800000)
            out[i] = _U16(0x7FC0) if is_nan else _U16(_U32(bits[i] + half) >> _U32(16))
    elif code == _F16:
        out = raw.view(_U16)
        for i in range(values.size):
            sign = _U32(_U32(bits[i] >> _U32(16)) & _U32(0x8000))
            magnitude = _U32(bits[i] & _U32(0x7FFFFFFF))
            if magnitude > _U32(0x7F800000):
                half = _U32(0x7E00)
            elif magnitude >= _U32(0x47800000):
                half = _U32(0x7C00)
            elif magnitude < _U32(0x38800000):
                # Subnormal: float32 itself rounds to multiples of 2⁻²⁴ when it adds 0.5.
                half = _U32(_FLOAT(magnitude.view(_FLOAT) + _FLOAT(0.5)).view(_U32) - _U32(0x3F000000))
            else:
                even = _U32(_U32(magnitude >> _U32(13)) & _U32(1))
                half = _U32(_U32(magnitude - _U32(112 << 23) + _U32(0xFFF) + even) >> _U32(13))
            out[i] = _U16(sign | half)
    else:
        _copy(values, raw.view(_FLOAT))


@njit(**_PLAIN)
def _noise(index: int, keys: Array) -> Any:
    """The word of `rv_distributed.kernels.noise` with this index; its keys change with the upper half of the index."""
    later = (index >> 32) != (_I64(keys[4]) | _I64(keys[5]) << 32)
    x = _U32(_U32(index & 0xFFFFFFFF) + (keys[2] if later else keys[0]))
    x = _U32(_U32(x ^ _U32(x >> _U32(17))) * _U32(0xED5AD4BB))
    x = _U32(x ^ (keys[3] if later else keys[1]))
    x = _U32(_U32(x ^ _U32(x >> _U32(11))) * _U32(0xAC4C1B51))
    x = _U32(_U32(x ^ _U32(x >> _U32(15))) * _U32(0x31848BAB))
    return _U32(x ^ _U32(x >> _U32(14)))


@njit(**_PLAIN)
def _narrow_by_chance(values: Array, code: int, raw: Array, first: int, keys: Array) -> None:
    """As `_narrow`, but stochastically, for the dtypes of 16 bits; ``first`` is the first element in its tensor.

    The methods, and the reasons for them, are those of `rv_distributed.kernels.rounding`.
    """
    _narrow(values, code, raw)
    bits, out = values.view(_U32), raw.view(_U16)
    if code == _BF16:
        for i in range(values.size):
            word = _noise((first + i) >> 1, keys)
            half = _U32(word >> _U32(16)) if (first + i) & 1 else _U32(word & _U32(0xFFFF))
            if _U32(bits[i] & _U32(0x7FFFFFFF)) < _U32(0x7F7F0000):
                out[i] = _U16(_U32(bits[i] + half) >> _U32(16))
    elif code == _F16:
        for i in range(values.size):
            magnitude = _FLOAT(abs(values[i]))
            if magnitude < _FLOAT(65504.0):
                exponent = max(_I32(_U32(bits[i] & _U32(0x7FFFFFFF)) >> _U32(23)) - _I32(127 + 10), _I32(-24))
                scaled = _FLOAT(magnitude * _U32(_U32(127 - exponent) << _U32(23)).view(_FLOAT))
                whole = _FLOAT(np.floor(scaled))
                signed = _I32(_I32(_noise(first + i, keys)) >> _I32(9))
                uniform = _FLOAT(_FLOAT(_FLOAT(signed) * _FLOAT(2.0**-23)) + _FLOAT(0.5 + 2.0**-24))
                if _FLOAT(scaled - whole) > uniform:
                    whole = _FLOAT(whole + _FLOAT(1.0))
                # The neighbours' bits count up from 0 in units of the spacing, and on from each exponent's first.
                step = _U32(_U32(whole) + _U32(_U32(exponent + 24) << _U32(10)))
                out[i] = _U16(_U32(_U32(bits[i] >> _U32(16)) & _U32(0x8000)) | step)


@njit(**_PLAIN)
def _subtract(values: Array, other: Array) -> None:
    for i in range(values.size):
        values[i] = _FLOAT(values[i] - other[i])


@njit(**_PLAIN)
def _scale_and_add(values: Array, d: Array, alpha: float, into: Array) -> None:
    """``into = RN(values + RN(alpha·d))``."""
    for i in range(d.size):
        into[i] = _FLOAT(values[i] + _FLOAT(alpha * d[i]))


@njit(**_SUMS)
def _add_sums(t: Array, v: Array, o: Array, alpha: float, sums: Array) -> None:
    """All sums, in float64, in which every product of two float32 is exact."""
    v_sq = t_sq = v_t = moved_v = error_sq = 0.0
    for i in range(v.size):
        x, y = _DOUBLE(v[i]), _DOUBLE(t[i])
        moved = _DOUBLE(o[i]) - y
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


@njit(**_SUMS)
def _add_squares(t: Array, v: Array, sums: Array) -> None:
    v_sq = t_sq = 0.0
    for i in range(v.size):
        v_sq += _DOUBLE(v[i]) * _DOUBLE(v[i])
        t_sq += _DOUBLE(t[i]) * _DOUBLE(t[i])
    sums[V_SQ] += v_sq
    sums[T_SQ] += t_sq


@njit(**_PLAIN)
def _look_at_vector(v: Array, counts: Array) -> None:
    """Largest magnitude and non-zero elements; as integers, magnitudes have their order, with NaN above all."""
    bits = v.view(_I32)
    largest = nonzero = _I32(0)
    for i in range(v.size):
        size = _I32(bits[i] & _I32(0x7FFFFFFF))
        largest = _I32(max(largest, size))
        nonzero = _I32(nonzero + _I32(size != _I32(0)))
    counts[V_MAX_BITS] = max(counts[V_MAX_BITS], _I64(largest))
    counts[NONZERO] += nonzero


@njit(**_PLAIN)
def _find_steps16(target: Array, out: Array, odd: bool, t: Array, o: Array, steps: Array) -> Any:
    """How many numbers of a 16-bit dtype an element of ``out`` is away from that of ``target``; returns the most.

    ``steps`` gets them, cut off where int16 ends; −1 where ``t`` and ``o`` differ and are not both finite, for which
    ``odd`` says to look.
    """
    most = _I32(0)
    for i in range(steps.size):
        # Two's complement, in place of sign and magnitude, makes one sequence of all numbers, with one zero.
        x, y = _I32(_I16(target[i])), _I32(_I16(out[i]))
        x_sign, y_sign = _I32(x >> _I32(31)), _I32(y >> _I32(31))
        x = _I32(_I32(_I32(x & _I32(0x7FFF)) ^ x_sign) - x_sign)
        y = _I32(_I32(_I32(y & _I32(0x7FFF)) ^ y_sign) - y_sign)
        step = _I32(abs(_I32(y - x)))
        if odd and not (np.isfinite(t[i]) and np.isfinite(o[i])):
            step = -_I32(step != 0 and not (np.isnan(t[i]) and np.isnan(o[i])))
        most = _I32(max(most, step))
        steps[i] = _I16(min(step, _I32(0x7FFF)))
    return _I64(most)


@njit(**_PLAIN)
def _find_steps32(target: Array, out: Array, odd: bool, t: Array, o: Array, steps: Array) -> Any:
    """As `_find_steps16`, of float32."""
    most = _I64(0)
    for i in range(steps.size):
        x, y = _I64(target[i]), _I64(out[i])
        x = -(x & 0x7FFFFFFF) if x >> 31 else x
        y = -(y & 0x7FFFFFFF) if y >> 31 else y
        step = abs(y - x)
        if odd and not (np.isfinite(t[i]) and np.isfinite(o[i])):
            step = -_I64(step != 0 and not (np.isnan(t[i]) and np.isnan(o[i])))
        most = max(most, step)
        steps[i] = _I16(min(step, _I64(0x7FFF)))
    return most


@njit(**_PLAIN)
def _count_changed(v: Array, steps: Array, counts: Array) -> None:
    bits = v.view(_I32)
    changed = absorbed = _I32(0)
    for i in range(steps.size):
        same = steps[i] == _I16(0)
        changed = _I32(changed + _I32(not same))
        absorbed = _I32(absorbed + _I32(same & (_I32(bits[i] & _I32(0x7FFFFFFF)) != _I32(0))))
    counts[CHANGED] += changed
    counts[ABSORBED] += absorbed


@njit(**_PLAIN)
def _count_steps(steps: Array, ulps: Array) -> None:
    """How many are at least 1, 2, 3, 5, 9, 17, 65 and 257."""
    a = b = c = d = e = f = g = h = _I16(0)
    for i in range(steps.size):
        step = steps[i]
        a = _I16(a + _I16(step >= _I16(1)))
        b = _I16(b + _I16(step >= _I16(2)))
        c = _I16(c + _I16(step >= _I16(3)))
        d = _I16(d + _I16(step >= _I16(5)))
        e = _I16(e + _I16(step >= _I16(9)))
        f = _I16(f + _I16(step >= _I16(17)))
        g = _I16(g + _I16(step >= _I16(65)))
        h = _I16(h + _I16(step >= _I16(257)))
    for place, count in enumerate((a, b, c, d, e, f, g, h)):
        ulps[place] += count


@njit(**_PLAIN)
def _has_nonfinite(raw: Array, code: int) -> Any:
    if code == _F32:
        bits32 = raw.view(_U32)
        top32 = _U32(0)
        for i in range(bits32.size):
            top32 = _U32(max(top32, _U32(bits32[i] & _U32(0x7FFFFFFF))))
        return top32 >= _U32(_INFINITY[_F32])
    bits = raw.view(_U16)
    top = _U16(0)
    for i in range(bits.size):
        top = _U16(max(top, _U16(bits[i] & _U16(0x7FFF))))
    return top >= _U16(_INFINITY[code])


@njit(**_PLAIN)
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


@njit(**_PLAIN)
def _measure(
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
    nonfinite = _has_nonfinite(out, code)
    odd = nonfinite or (level != NOTHING and _has_nonfinite(target, code))
    if odd or level == FULL:
        _widen(out, code, o)
    if nonfinite:
        _count_nonfinite(t, v, o, first, counts)
    if level == NOTHING:
        return
    _look_at_vector(v, counts)
    if level == FULL:
        _add_sums(t, v, o, alpha, sums)
    else:
        _add_squares(t, v, sums)
    if code == _F32:
        most = _find_steps32(target.view(_U32), out.view(_U32), odd, t, o, steps)
    else:
        most = _find_steps16(target.view(_U16), out.view(_U16), odd, t, o, steps)
    _count_changed(v, steps, counts)
    counts[ULPS_MAX] = max(counts[ULPS_MAX], most)
    if level == FULL:
        _count_steps(steps, counts[ULPS:])


@njit(**_PLAIN)
def _count_inexact(d: Array, o: Array) -> Any:
    inexact = 0
    for i in range(d.size):
        inexact += o[i] != d[i] and not (np.isnan(o[i]) and np.isnan(d[i]))
    return inexact


def _combine(
    arena: Array,
    target_at: int,
    target_code: int,
    vectors: Array,
    alphas: Array,
    outs: Array,
    at: int,
    code: int,
    first_element: int,
    count: int,
    keys: Array,
    weighted: bool,
    level: int,
    scratch: Array,
    spare: Array,
    steps: Array,
    sums: Array,
    counts: Array,
) -> None:
    """Compute ``count`` elements from ``first_element`` of a tensor, in every output.

    ``arena`` (bytes) holds the operands: the target at ``target_at``, or none if ``target_code`` is `NO_TENSOR`: then
    there is one vector and one output, and the output is the vector. ``vectors`` (int64) has a row ``at, code, at,
    code`` for plus and minus of each vector; a minus of the code `NO_TENSOR` is none. ``alphas`` (float32) has a row an
    output and a column a vector, ``outs`` (bytes, contiguous) a row an output, which gets elements of dtype ``code``
    from byte ``at``. ``keys`` (uint32) are those of stochastic rounding, or empty for rounding to nearest.
    ``weighted`` says what is measured as v: the weighted sum of the vectors, or the one that there is. The measures are
    added to ``sums`` (float64) and ``counts`` (int64), which have a row an output. ``scratch`` (float32) has 4 rows and
    two for each output, ``spare`` (bytes) has 3 and ``steps`` (int16) is one, all of at least `STRIP` elements.
    """
    width = _WIDTHS[code]
    for first in range(0, count, STRIP):
        n = min(STRIP, count - first)
        t, d, other, o = scratch[0, :n], scratch[1, :n], scratch[2, :n], scratch[3, :n]
        # What the output would be without any vector.
        base = spare[0, : n * width]
        if target_code == NO_TENSOR:
            _fill(t, 0)
            _fill(base, 0)
        else:
            size = _WIDTHS[target_code]
            raw = _aligned(arena, target_at + first * size, n, size, spare[1])
            _widen(raw, target_code, t)
            if target_code == code:
                base = raw
            else:
                _narrow(t, code, base)
        if vectors.shape[0] == 0:
            _fill(d, 0)
            for k in range(outs.shape[0]):
                _copy(t, scratch[4 + 2 * k, :n])
                _fill(scratch[5 + 2 * k, :n], 0)
        for number in range(vectors.shape[0]):
            size = _WIDTHS[vectors[number, 1]]
            _widen(_aligned(arena, vectors[number, 0] + first * size, n, size, spare[2]), vectors[number, 1], d)
            if vectors[number, 3] != NO_TENSOR:
                size = _WIDTHS[vectors[number, 3]]
                _widen(_aligned(arena, vectors[number, 2] + first * size, n, size, spare[2]), vectors[number, 3], other)
                _subtract(d, other)
            for k in range(outs.shape[0]):
                acc, v, alpha = scratch[4 + 2 * k, :n], scratch[5 + 2 * k, :n], alphas[k, number]
                if weighted and number == 0:
                    _fill(v, 0)
                if alpha != 0:
                    _scale_and_add(t if number == 0 else acc, d, alpha, acc)
                    if weighted:
                        _scale_and_add(v, d, alpha, v)
                elif number == 0:
                    _copy(t, acc)
        for k in range(outs.shape[0]):
            out = outs[k, at + first * width : at + (first + n) * width]
            acc = d if target_code == NO_TENSOR else scratch[4 + 2 * k, :n]
            if target_code == code and not alphas[k].any():
                _copy(base, out)
            elif keys.size and code != _F32:
                _narrow_by_chance(acc, code, out, first_element + first, keys)
            else:
                _narrow(acc, code, out)
            v = scratch[5 + 2 * k, :n] if weighted else d
            alpha64 = 1.0 if weighted or vectors.shape[0] == 0 else _DOUBLE(alphas[k, 0])
            _measure(level, t, base, v, alpha64, out, code, first, o, steps[:n], sums[k], counts[k])
            if target_code == NO_TENSOR and level != NOTHING:
                _widen(out, code, o)
                counts[k, INEXACT] += _count_inexact(d, o)


combine: Final = _Entry(_combine)
