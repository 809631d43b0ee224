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

from rv_distributed.kernels.entry import PLAIN, Entry

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
Convert = Callable[[Any], Any]

_SUMS: Final[dict[str, Any]] = {**PLAIN, "fastmath": {"reassoc", "contract", "nsz"}}


@njit(**PLAIN)
def _copy(source: Array, into: Array) -> None:
    # Numba compiles an assignment to a slice four times as long, for the sake of its error messages.
    for i in range(into.size):
        into[i] = source[i]


@njit(**PLAIN)
def _fill(into: Array, value: int) -> None:
    for i in range(into.size):
        into[i] = value


@njit(**PLAIN, inline="always")
def _aligned(raw: Array, at: int, count: int, width: int, spare: Array) -> Array:
    """``count`` elements of ``raw`` from byte ``at``: in place, or in ``spare`` where they lie at odd addresses."""
    if at % width == 0:
        return raw[at : at + count * width]
    into = spare[: count * width]
    _copy(raw[at : at + count * width], into)
    return into


@njit(**PLAIN)
def _from_bf16(bits: Any) -> Any:
    return _U32(_U32(bits) << _U32(16)).view(_FLOAT)


@njit(**PLAIN)
def _from_f16(bits: Any) -> Any:
    # The exponents' biases differ by 112; multiplying makes subnormal numbers normal on the way.
    value = _FLOAT(_U32(_U32(bits & _U16(0x7FFF)) << _U32(13)).view(_FLOAT) * _FLOAT(2.0**112))
    magnitude = value.view(_U32)
    if value >= _FLOAT(65536.0):
        magnitude = _U32(magnitude | _U32(0x7F800000))
    return _U32(magnitude | _U32(_U32(bits & _U16(0x8000)) << _U32(16))).view(_FLOAT)


@njit(**PLAIN)
def _as_f32(value: Any) -> Any:
    return value


@njit(**PLAIN)
def _to_bf16(value: Any) -> Any:
    bits = _FLOAT(value).view(_U32)
    # Half a unit, or just less where the last bit is 0: what is larger carries into the upper half.
    half = _U32(_U32(0x7FFF) + _U32(_U32(bits >> _U32(16)) & _U32(1)))
    is_nan = _U32(bits & _U32(0x7FFFFFFF)) > _U32(0x7F800000)
    return _U16(0x7FC0) if is_nan else _U16(_U32(bits + half) >> _U32(16))


@njit(**PLAIN)
def _to_f16(value: Any) -> Any:
    bits = _FLOAT(value).view(_U32)
    sign = _U32(_U32(bits >> _U32(16)) & _U32(0x8000))
    magnitude = _U32(bits & _U32(0x7FFFFFFF))
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
    return _U16(sign | half)


def _converting(convert: Convert) -> Callable[..., None]:
    @njit(**PLAIN)
    def loop(source: Array, into: Array) -> None:
        for i in range(into.size):
            into[i] = convert(source[i])

    return loop  # type: ignore[no-any-return]


_widen_bf16, _widen_f16 = _converting(_from_bf16), _converting(_from_f16)
_narrow_to_bf16, _narrow_to_f16 = _converting(_to_bf16), _converting(_to_f16)


@njit(**PLAIN)
def _widen(raw: Array, code: int, into: Array) -> None:
    """Float32 from the elements of ``raw``; exact."""
    if code == _BF16:
        _widen_bf16(raw.view(_U16), into)
    elif code == _F16:
        _widen_f16(raw.view(_U16), into)
    else:
        _copy(raw.view(_FLOAT), into)


@njit(**PLAIN)
def _narrow(values: Array, code: int, raw: Array) -> None:
    """The values rounded to nearest even, as elements of ``raw``."""
    if code == _BF16:
        _narrow_to_bf16(values, raw.view(_U16))
    elif code == _F16:
        _narrow_to_f16(values, raw.view(_U16))
    else:
        _copy(values, raw.view(_FLOAT))


@njit(**PLAIN)
def _fill_words(first: int, key: int, other_key: int, into: Array) -> None:
    start = _U32(first & 0xFFFFFFFF)
    for i in range(into.size):
        x = _U32(_U32(start + _U32(i)) + key)
        x = _U32(_U32(x ^ _U32(x >> _U32(17))) * _U32(0xED5AD4BB))
        x = _U32(x ^ other_key)
        x = _U32(_U32(x ^ _U32(x >> _U32(11))) * _U32(0xAC4C1B51))
        x = _U32(_U32(x ^ _U32(x >> _U32(15))) * _U32(0x31848BAB))
        into[i] = _U32(x ^ _U32(x >> _U32(14)))


@njit(**PLAIN)
def _fill_noise(first: int, keys: Array, into: Array) -> None:
    """The words of `rv_distributed.kernels.noise` from index ``first`` on; the keys change with its upper half."""
    border = ((_I64(keys[4]) | _I64(keys[5]) << 32) + 1) << 32
    before = min(max(border - first, 0), into.size)
    _fill_words(first, keys[0], keys[1], into[:before])
    _fill_words(first + before, keys[2], keys[3], into[before:])


@njit(**PLAIN)
def _narrow_by_chance(values: Array, code: int, raw: Array, first: int, keys: Array, words: Array) -> None:
    """As `_narrow`, but stochastically, for the dtypes of 16 bits; ``first`` is the first element in its tensor, and
    ``words`` (uint32) is scratch for one more than the values.

    The methods, and the reasons for them, are those of `rv_distributed.kernels.rounding`.
    """
    _narrow(values, code, raw)
    bits, out = values.view(_U32), raw.view(_U16)
    if code == _BF16:
        # An even element has the lower half of a word, which comes first in memory, and the next one the upper half.
        _fill_noise(first >> 1, keys, words[: (values.size >> 1) + 1])
        halves = words.view(_U16)[first & 1 :]
        for i in range(values.size):
            if _U32(bits[i] & _U32(0x7FFFFFFF)) < _U32(0x7F7F0000):
                out[i] = _U16(_U32(bits[i] + _U32(halves[i])) >> _U32(16))
    elif code == _F16:
        _fill_noise(first, keys, words[: values.size])
        for i in range(values.size):
            magnitude = _FLOAT(abs(values[i]))
            if magnitude < _FLOAT(65504.0):
                exponent = max(_I32(_U32(bits[i] & _U32(0x7FFFFFFF)) >> _U32(23)) - _I32(127 + 10), _I32(-24))
                scaled = _FLOAT(magnitude * _U32(_U32(127 - exponent) << _U32(23)).view(_FLOAT))
                whole = _FLOAT(np.floor(scaled))
                signed = _I32(_I32(words[i]) >> _I32(9))
                uniform = _FLOAT(_FLOAT(_FLOAT(signed) * _FLOAT(2.0**-23)) + _FLOAT(0.5 + 2.0**-24))
                if _FLOAT(scaled - whole) > uniform:
                    whole = _FLOAT(whole + _FLOAT(1.0))
                # The neighbours' bits count up from 0 in units of the spacing, and on from each exponent's first.
                step = _U32(_U32(whole) + _U32(_U32(exponent + 24) << _U32(10)))
                out[i] = _U16(_U32(_U32(bits[i] >> _U32(16)) & _U32(0x8000)) | step)


def _subtracting(convert: Convert) -> Callable[..., None]:
    @njit(**PLAIN)
    def loop(values: Array, source: Array) -> None:
        for i in range(values.size):
            values[i] = _FLOAT(values[i] - convert(source[i]))

    return loop  # type: ignore[no-any-return]


_subtract_bf16, _subtract_f16, _subtract_f32 = map(_subtracting, (_from_bf16, _from_f16, _as_f32))


@njit(**PLAIN)
def _subtract(values: Array, raw: Array, code: int) -> None:
    """Take the elements of ``raw`` from the values."""
    if code == _BF16:
        _subtract_bf16(values, raw.view(_U16))
    elif code == _F16:
        _subtract_f16(values, raw.view(_U16))
    else:
        _subtract_f32(values, raw.view(_FLOAT))


@njit(**PLAIN)
def _add_scaled(values: Array, d: Array, alpha: float) -> None:
    """``values = RN(values + RN(alpha·d))``, in place: with one array in two roles, `_scale_and_add` is no vectors."""
    for i in range(d.size):
        values[i] = _FLOAT(values[i] + _FLOAT(alpha * d[i]))


@njit(**PLAIN)
def _add_scaled_fused(values: Array, d: Array, alpha: float) -> None:
    """``values = RN(values + alpha·d)``: float64 holds every product of two float32."""
    for i in range(d.size):
        values[i] = _FLOAT(_DOUBLE(values[i]) + _DOUBLE(alpha) * _DOUBLE(d[i]))


@njit(**PLAIN)
def _divide_and_scale(values: Array, divisor: float, scale: float) -> None:
    for i in range(values.size):
        values[i] = _FLOAT(_FLOAT(values[i] / divisor) * scale)


def _scaling_and_adding(convert: Convert) -> Callable[..., None]:
    @njit(**PLAIN)
    def loop(values: Array, d: Array, alpha: float, into: Array) -> None:
        for i in range(d.size):
            into[i] = convert(_FLOAT(values[i] + _FLOAT(alpha * d[i])))

    return loop  # type: ignore[no-any-return]


_scale_and_add_to_bf16, _scale_and_add_to_f16, _scale_and_add = map(_scaling_and_adding, (_to_bf16, _to_f16, _as_f32))


@njit(**PLAIN)
def _scale_add_and_narrow(values: Array, d: Array, alpha: float, code: int, raw: Array) -> None:
    """``RN(values + RN(alpha·d))`` rounded to nearest even, as elements of ``raw``."""
    if code == _BF16:
        _scale_and_add_to_bf16(values, d, alpha, raw.view(_U16))
    elif code == _F16:
        _scale_and_add_to_f16(values, d, alpha, raw.view(_U16))
    else:
        _scale_and_add(values, d, alpha, raw.view(_FLOAT))


def _adding_sums(convert: Convert) -> Callable[..., None]:
    @njit(**_SUMS)
    def loop(t: Array, v: Array, out: Array, alpha: float, sums: Array) -> None:
        v_sq = t_sq = v_t = moved_v = error_sq = 0.0
        for i in range(v.size):
            x, y = _DOUBLE(v[i]), _DOUBLE(t[i])
            moved = _DOUBLE(convert(out[i])) - y
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

    return loop  # type: ignore[no-any-return]


_add_sums_bf16, _add_sums_f16, _add_sums_f32 = map(_adding_sums, (_from_bf16, _from_f16, _as_f32))


@njit(**PLAIN)
def _add_sums(t: Array, v: Array, out: Array, code: int, alpha: float, sums: Array) -> None:
    """All sums, in float64, in which every product of two float32 is exact."""
    if code == _BF16:
        _add_sums_bf16(t, v, out.view(_U16), alpha, sums)
    elif code == _F16:
        _add_sums_f16(t, v, out.view(_U16), alpha, sums)
    else:
        _add_sums_f32(t, v, out.view(_FLOAT), alpha, sums)


@njit(**_SUMS)
def _add_squares(t: Array, v: Array, sums: Array) -> None:
    v_sq = t_sq = 0.0
    for i in range(v.size):
        v_sq += _DOUBLE(v[i]) * _DOUBLE(v[i])
        t_sq += _DOUBLE(t[i]) * _DOUBLE(t[i])
    sums[V_SQ] += v_sq
    sums[T_SQ] += t_sq


@njit(**PLAIN)
def _find_steps16(target: Array, out: Array, steps: Array) -> tuple[Any, Any]:
    """How many numbers of a 16-bit dtype each element of ``out`` is away from that of ``target``.

    Returns the most, and the largest magnitude of all elements, as bits.
    """
    most = largest = _U16(0)
    for i in range(steps.size):
        x, y = _I16(target[i]), _I16(out[i])
        x_size, y_size = _I16(x & _I16(0x7FFF)), _I16(y & _I16(0x7FFF))
        largest = _U16(max(largest, max(_U16(x_size), _U16(y_size))))
        # Two's complement, in place of sign and magnitude, makes one sequence of all numbers, with one zero; and
        # counted from its other end the differences need no sign.
        x_sign, y_sign = _I16(x >> _I16(15)), _I16(y >> _I16(15))
        x_place = _U16(_U16(_I16(_I16(x_size ^ x_sign) - x_sign)) ^ _U16(0x8000))
        y_place = _U16(_U16(_I16(_I16(y_size ^ y_sign) - y_sign)) ^ _U16(0x8000))
        steps[i] = _U16(max(x_place, y_place) - min(x_place, y_place))
        most = _U16(max(most, steps[i]))
    return _I64(most), _I64(largest)


@njit(**PLAIN)
def _find_steps32(target: Array, out: Array, steps: Array) -> tuple[Any, Any]:
    """As `_find_steps16`, of float32; ``steps`` end where uint16 does."""
    most = largest = _U32(0)
    for i in range(steps.size):
        x, y = _I32(target[i]), _I32(out[i])
        x_size, y_size = _I32(x & _I32(0x7FFFFFFF)), _I32(y & _I32(0x7FFFFFFF))
        largest = _U32(max(largest, max(_U32(x_size), _U32(y_size))))
        x_sign, y_sign = _I32(x >> _I32(31)), _I32(y >> _I32(31))
        x_place = _U32(_U32(_I32(_I32(x_size ^ x_sign) - x_sign)) ^ _U32(0x80000000))
        y_place = _U32(_U32(_I32(_I32(y_size ^ y_sign) - y_sign)) ^ _U32(0x80000000))
        step = _U32(max(x_place, y_place) - min(x_place, y_place))
        most = _U32(max(most, step))
        steps[i] = _U16(min(step, _U32(0xFFFF)))
    return _I64(most), _I64(largest)


@njit(**PLAIN)
def _place(value: float) -> Any:
    """The place of a float32 in the sequence of all of them."""
    bits = _I64(_FLOAT(value).view(_U32))
    return -(bits & 0x7FFFFFFF) if bits >> 31 else bits


@njit(**PLAIN)
def _take_out_nonfinite(t: Array, v: Array, o: Array, steps: Array, counts: Array) -> Any:
    """Count the changes from or to NaN and infinity, between which and other numbers there are no steps, and set
    their steps to 0; returns the most of the others. Called where there are some, which is rare."""
    most = _I64(0)
    for i in range(steps.size):
        if np.isfinite(t[i]) and np.isfinite(o[i]):
            cut_off = steps[i] == _U16(0xFFFF)
            most = max(most, abs(_place(t[i]) - _place(o[i])) if cut_off else _I64(steps[i]))
            continue
        if steps[i] != _U16(0) and not (np.isnan(t[i]) and np.isnan(o[i])):
            counts[CHANGED] += 1
            # `_count_changes` will take it for one that is not changed.
            counts[ABSORBED] -= v[i] != _FLOAT(0)
        steps[i] = _U16(0)
    return most


@njit(**PLAIN)
def _count_changes(v: Array, steps: Array, counts: Array) -> None:
    """Largest magnitude and elements that are not 0, of v; elements that are changed, and that v could not change."""
    bits = v.view(_I32)
    largest = nonzero = changed = absorbed = _I32(0)
    for i in range(v.size):
        # As integers, magnitudes have their order, with NaN above all.
        size = _I32(bits[i] & _I32(0x7FFFFFFF))
        largest = _I32(max(largest, size))
        moves, moved = size != _I32(0), steps[i] != _U16(0)
        nonzero = _I32(nonzero + _I32(moves))
        changed = _I32(changed + _I32(moved))
        absorbed = _I32(absorbed + _I32(moves & (not moved)))
    counts[V_MAX_BITS] = max(counts[V_MAX_BITS], _I64(largest))
    counts[NONZERO] += nonzero
    counts[CHANGED] += changed
    counts[ABSORBED] += absorbed


@njit(**PLAIN)
def _count_steps(steps: Array, ulps: Array) -> None:
    """How many are at least 1, 2, 3, 5, 9, 17, 65 and 257."""
    a = b = c = d = e = f = g = h = _U16(0)
    for i in range(steps.size):
        step = steps[i]
        a = _U16(a + _U16(step >= _U16(1)))
        b = _U16(b + _U16(step >= _U16(2)))
        c = _U16(c + _U16(step >= _U16(3)))
        d = _U16(d + _U16(step >= _U16(5)))
        e = _U16(e + _U16(step >= _U16(9)))
        f = _U16(f + _U16(step >= _U16(17)))
        g = _U16(g + _U16(step >= _U16(65)))
        h = _U16(h + _U16(step >= _U16(257)))
    for place, count in enumerate((a, b, c, d, e, f, g, h)):
        ulps[place] += count


@njit(**PLAIN)
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
    if level == NOTHING:
        if _has_nonfinite(out, code):
            _widen(out, code, o)
            _count_nonfinite(t, v, o, first, counts)
        return
    if code == _F32:
        most, largest = _find_steps32(target.view(_U32), out.view(_U32), steps)
    else:
        most, largest = _find_steps16(target.view(_U16), out.view(_U16), steps)
    if largest >= _INFINITY[code]:
        _widen(out, code, o)
        _count_nonfinite(t, v, o, first, counts)
        most = _take_out_nonfinite(t, v, o, steps, counts)
    _count_changes(v, steps, counts)
    counts[ULPS_MAX] = max(counts[ULPS_MAX], most)
    if level == FULL:
        _add_sums(t, v, out, code, alpha, sums)
        _count_steps(steps, counts[ULPS:])
    else:
        _add_squares(t, v, sums)


@njit(**PLAIN)
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
    after: Array,
    fused: bool,
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
    output and a column a vector. ``after`` (float32) is empty, or has a row ``divisor, scale`` an output: then the
    vectors are added to each other, ``fused`` or not, divided, scaled, and added to the target, or are the output where
    there is none. ``outs`` (bytes, contiguous) has a row an output, which gets elements of dtype ``code`` from byte
    ``at``. ``keys`` (uint32) are those of stochastic rounding, or empty for rounding to nearest. ``weighted`` says what
    is measured as v: the weighted sum of the vectors, or the one that there is. The measures are added to ``sums``
    (float64) and ``counts`` (int64), which have a row an output. ``scratch`` (float32) has 3 rows and two for each
    output, ``spare`` (bytes) has 3 and ``steps`` (uint16) is one, all of at least `STRIP` elements.
    """
    width = _WIDTHS[code]
    summed = after.shape[0] > 0
    by_chance = keys.size > 0 and code != _F32
    for first in range(0, count, STRIP):
        n = min(STRIP, count - first)
        t, d, o = scratch[0, :n], scratch[1, :n], scratch[2, :n]
        low, high = at + first * width, at + (first + n) * width
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
                _copy(t, scratch[3 + 2 * k, :n])
                _fill(scratch[4 + 2 * k, :n], 0)
        for number in range(vectors.shape[0]):
            size = _WIDTHS[vectors[number, 1]]
            _widen(_aligned(arena, vectors[number, 0] + first * size, n, size, spare[2]), vectors[number, 1], d)
            if vectors[number, 3] != NO_TENSOR:
                size = _WIDTHS[vectors[number, 3]]
                raw = _aligned(arena, vectors[number, 2] + first * size, n, size, spare[2])
                _subtract(d, raw, vectors[number, 3])
            for k in range(outs.shape[0] if target_code != NO_TENSOR or summed else 0):
                acc, v, alpha = scratch[3 + 2 * k, :n], scratch[4 + 2 * k, :n], alphas[k, number]
                if weighted:
                    if number == 0:
                        _fill(v, 0)
                    if alpha != 0 and fused:
                        _add_scaled_fused(v, d, alpha)
                    elif alpha != 0:
                        _add_scaled(v, d, alpha)
                if summed:
                    continue
                if alpha != 0 and number == vectors.shape[0] - 1 and not by_chance:
                    _scale_add_and_narrow(t if number == 0 else acc, d, alpha, code, outs[k, low:high])
                elif number > 0 and alpha != 0:
                    _add_scaled(acc, d, alpha)
                elif number == 0 and alpha != 0:
                    _scale_and_add(t, d, alpha, acc)
                elif number == 0:
                    _copy(t, acc)
        for k in range(outs.shape[0]):
            out = outs[k, low:high]
            acc = d if target_code == NO_TENSOR else scratch[3 + 2 * k, :n]
            if summed and vectors.shape[0] > 0:
                _divide_and_scale(scratch[4 + 2 * k, :n], after[k, 0], after[k, 1])
                if target_code == NO_TENSOR:
                    acc = scratch[4 + 2 * k, :n]
                else:
                    _scale_and_add(t, scratch[4 + 2 * k, :n], _FLOAT(1.0), acc)
            if target_code == code and not alphas[k].any():
                _copy(base, out)
            elif by_chance:
                _narrow_by_chance(acc, code, out, first_element + first, keys, scratch[2].view(_U32))
            elif summed or target_code == NO_TENSOR or vectors.shape[0] == 0 or alphas[k, -1] == 0:
                _narrow(acc, code, out)
            v = scratch[4 + 2 * k, :n] if weighted else d
            alpha64 = 1.0 if weighted or vectors.shape[0] == 0 else _DOUBLE(alphas[k, 0])
            _measure(level, t, base, v, alpha64, out, code, first, o, steps[:n], sums[k], counts[k])
            if target_code == NO_TENSOR and level != NOTHING and not summed:
                _widen(out, code, o)
                counts[k, INEXACT] += _count_inexact(d, o)


def _noise(first: int, keys: Array, into: Array) -> None:
    """The words of `_fill_noise`, for what is rounded elsewhere."""
    _fill_noise(first, keys, into)


def _all_sums(t: Array, v: Array, out: Array, alpha: float, sums: Array) -> None:
    """The sums of `_add_sums` over float32, for what is computed elsewhere."""
    for first in range(0, v.size, STRIP):
        last = min(first + STRIP, v.size)
        _add_sums_f32(t[first:last], v[first:last], out[first:last], alpha, sums)


combine: Final = Entry(_combine)
noise: Final = Entry(_noise)
all_sums: Final = Entry(_all_sums)
