"""Rounding and its random bits in NumPy, by other ways than the code's: neighbours and distances.

Like `reference`, written from the specification, with nothing of rv_distributed.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from reference import Raw, narrow, widen

Words = npt.NDArray[np.uint32]
F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[Any]


def noise32(seed: int, name: str, first: int, count: int) -> Words:
    """A word for every index: triple32, with one key added to the index modulo 2³² and one xored in after a round."""
    index = first + np.arange(count, dtype=np.uint64)
    high, words = index >> np.uint64(32), np.empty(count, np.uint32)
    for value in np.unique(high):
        digest = blake3(struct.pack("<QQ", seed, value) + name.encode()).digest()
        one, two = (np.uint32(key) for key in struct.unpack("<II", digest[:8]))
        x = index[high == value].astype(np.uint32) + one
        x = (x ^ x >> np.uint32(17)) * np.uint32(0xED5AD4BB) ^ two
        x = (x ^ x >> np.uint32(11)) * np.uint32(0xAC4C1B51)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x31848BAB)
        words[high == value] = x ^ x >> np.uint32(14)
    return words


def noise16(seed: int, name: str, first: int, count: int) -> Words:
    """Half a word for every index: the lower half for even ones."""
    words = noise32(seed, name, first // 2, count // 2 + 2)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], 1).reshape(-1)
    return halves[first % 2 :][:count]


def neighbours(values: Floats, dtype: str) -> tuple[Words, F64, F64]:
    """The 16-bit number on each value's side of 0, as bits, and as magnitudes that number and the next one.

    The next one after the largest is taken as if it were not infinite.
    """
    magnitude = np.abs(values.astype(np.float64))
    signs = np.signbit(values).astype(np.uint32) << np.uint32(15)
    if dtype == "BF16":
        top = float(np.finfo(np.float32).max)
        bits = np.minimum(magnitude, top).astype(np.float32).view(np.uint32) >> np.uint32(16)
    else:
        bits = np.minimum(magnitude, 65504.0).astype(np.float16).view(np.uint16).astype(np.uint32)
    # The conversions round to nearest: one step too far at most.
    bits = bits - (_magnitude(bits, dtype) > magnitude)
    return bits | signs, _magnitude(bits, dtype), _magnitude(bits + 1, dtype)


def _magnitude(bits: Words, dtype: str) -> F64:
    found = widen(Raw(dtype, bits.shape, bits.astype(np.uint16).tobytes())).astype(np.float64)
    return np.where(np.isinf(found), 2.0**128 if dtype == "BF16" else 65536.0, found)


def nearest(given: Floats, dtype: str) -> bytes:
    """Float32 or float64 values rounded once, to nearest even."""
    with np.errstate(all="ignore"):
        values = given.astype(np.float64)
        if dtype == "F32":
            return values.astype(np.float32).tobytes()
        finite = np.where(np.isfinite(values), values, 0.0)
        bits, lower, upper = neighbours(finite, dtype)
        below, above = np.abs(finite) - lower, upper - np.abs(finite)
        rounded = bits + ((below > above) | ((below == above) & (bits % 2 == 1)))
        special = np.frombuffer(narrow(values.astype(np.float32), dtype), np.uint16)
    return np.where(np.isfinite(values), rounded, special).astype(np.uint16).tobytes()


def stochastic(values: Floats, dtype: str, *, seed: int, name: str, first: int = 0) -> bytes:
    """Float32 or float64 values rounded to one of their neighbours; to float32, and beyond the largest, to nearest."""
    if dtype == "F32":
        return nearest(values, dtype)
    finite = np.where(np.isfinite(values), values, values.dtype.type(0))
    bits, lower, upper = neighbours(finite, dtype)
    chance = (np.abs(finite).astype(np.float64) - lower) / (upper - lower)
    if values.dtype == np.float32 and dtype == "BF16":
        # The noise is added: the largest of it carries.
        up = noise16(seed, name, first, values.size) >= 65536 * (1 - chance)
    else:
        bits_used = 23 if values.dtype == np.float32 else 32
        signed = noise32(seed, name, first, values.size).view(np.int32) >> (32 - bits_used)
        up = (signed + 0.5) / 2.0**bits_used + 0.5 < chance
    largest = 3.3895313892515355e38 if dtype == "BF16" else 65504.0
    inside = np.abs(values) < largest
    plain = np.frombuffer(nearest(values, dtype), np.uint16)
    return np.where(inside, bits + up, plain).astype(np.uint16).tobytes()


def doubles(raw: Raw) -> F64:
    """The elements in float64, which holds every value of F64, F32, BF16 and F16."""
    if raw.dtype == "F64":
        return np.frombuffer(raw.data, np.float64)
    with np.errstate(invalid="ignore"):
        return widen(raw).astype(np.float64)


def wide_difference(plus: Raw, minus: Raw | None) -> F64:
    """``d = RN64(a − b)``."""
    with np.errstate(all="ignore"):
        return widen(plus).astype(np.float64) - (0.0 if minus is None else widen(minus).astype(np.float64))


def wide_accumulated(target: Raw, vectors: Sequence[tuple[Raw, Raw | None]], alphas: Sequence[float]) -> F64:
    """``acc = t``, then ``acc = RN64(acc + RN64(α·d))`` for each vector in order."""
    with np.errstate(all="ignore"):
        acc = widen(target).astype(np.float64)
        for (plus, minus), alpha in zip(vectors, alphas, strict=True):
            acc = acc + alpha * wide_difference(plus, minus)
    return acc
