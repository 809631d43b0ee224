"""Blocks of one stream through the compiled kernel: for the processor, computing in float32."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from rv_distributed.kernels import strips
from rv_distributed.kernels.entry import words
from rv_distributed.kernels.keys import COUNTERS, noise_keys
from rv_distributed.measures import Measures
from rv_distributed.recipe import Arithmetic, Stats, Weights

Bytes = npt.NDArray[np.uint8]
_LEVELS: Final = {"none": strips.NOTHING, "basic": strips.BASIC, "full": strips.FULL}
_NO_KEYS: Final = np.empty(0, np.uint32)
_NUMBER: Final = ("<i8", 0)
_BYTES, _MATRIX, _ROWS = ("|u1", 1), ("<f4", 2), ("|u1", 2)
#: The arguments of `strips.combine`.
_KINDS: Final = (
    *(_BYTES, _NUMBER, _NUMBER, ("<i8", 2), _MATRIX, _MATRIX, _NUMBER, _ROWS, _NUMBER, _NUMBER, _NUMBER, _NUMBER),
    *(("<u4", 1), _NUMBER, _NUMBER, _MATRIX, _ROWS, ("<u2", 1), ("<f8", 2), ("<i8", 2)),
)


class RawOperand(NamedTuple):
    """Elements of an operand, as bytes."""

    at: int
    """Its first byte in the arena."""
    dtype: str
    """By its safetensors name."""


class CompiledCombiner:
    """Scratch space of one thread, and the arithmetic of `rv_distributed.kernels.strips` over it.

    ``weighted`` as of `Combiner`.
    """

    def __init__(self, *, outputs: int, weighted: bool, stats: Stats, arithmetic: Arithmetic) -> None:
        self._level = _LEVELS[stats]
        self._arithmetic = arithmetic
        self._weighted = weighted
        scratch = np.empty((3 + 2 * outputs, strips.STRIP), np.float32)
        spare, steps = np.empty((3, 4 * strips.STRIP), np.uint8), np.empty(strips.STRIP, np.uint16)
        self._sums, self._counts = np.zeros((outputs, strips.SUMS)), np.zeros((outputs, strips.COUNTS), np.int64)
        # Looking at an array takes as long as the whole call: those that come again and again are looked at once.
        self._always = [word for array in (scratch, spare, steps, self._sums, self._counts) for word in words(array)]
        self._kept_alive = scratch, spare, steps
        self._weights: Sequence[Weights] | None = None
        self._looked_at: dict[str, tuple[object, tuple[int, ...]]] = {}

    def compute(
        self,
        arena: Bytes,
        target: RawOperand | None,
        vectors: Sequence[tuple[RawOperand, RawOperand | None]],
        weights: Sequence[Weights],
        outs: Bytes,
        at: int,
        dtype: str,
        *,
        name: str,
        first: int,
        count: int,
    ) -> list[Measures]:
        """Fill every row of ``outs`` with ``target + Σ αₖ·vₖ``, or without a target with the vector or the models' sum.

        They are ``count`` elements of ``dtype``, from byte ``at`` on, which is a multiple of its size, and from
        element ``first`` of the tensor ``name``; ``weights`` has those of each, and ``outs`` is contiguous. Returns the
        measures of each. Bits and measures are those of `Combiner`.
        """
        self._sums.fill(0)
        self._counts.fill(0)
        operands = np.array([_numbers(plus) + _numbers(minus) for plus, minus in vectors], np.int64).reshape(-1, 4)
        keys = self._keys(name if target else f"vector of {name}", first, dtype)
        strips.combine.of(*_KINDS)(
            *self._words_of("arena", arena),
            *((target.at, strips.CODES[target.dtype]) if target else (0, strips.NO_TENSOR)),
            *words(operands),
            *self._weighing(weights),
            self._arithmetic.order == "fused",
            *self._words_of("outs", outs),
            at,
            strips.CODES[dtype],
            first,
            count,
            *self._words_of("keys", keys),
            self._weighted,
            self._level,
            *self._always,
        )
        scales = [of.alphas[0] if of.alphas and target and not self._weighted else 1.0 for of in weights]
        return [_measures(*of) for of in zip(self._sums, self._counts, scales, strict=True)]

    def _words_of(self, role: str, array: npt.NDArray[Any]) -> tuple[int, ...]:
        known = self._looked_at.get(role)
        if known is None or known[0] is not array:
            known = self._looked_at[role] = array, words(array)
        return known[1]

    def _weighing(self, weights: Sequence[Weights]) -> tuple[int, ...]:
        if self._weights is not weights:
            self._weights = weights
            self._alphas = np.array([of.alphas for of in weights], np.float32).reshape(len(weights), -1)
            sums = [of[1:] for of in weights if self._arithmetic.order != "each"]
            self._after = np.array(sums, np.float32).reshape(-1, 2)
        return self._words_of("alphas", self._alphas) + self._words_of("after", self._after)

    def _keys(self, name: str, first: int, dtype: str) -> npt.NDArray[np.uint32]:
        if self._arithmetic.rounding == "nearest":
            return _NO_KEYS
        return word_keys(self._arithmetic.seed, name, first // 2 if dtype == "BF16" else first)


def word_keys(seed: int, name: str, first: int) -> npt.NDArray[np.uint32]:
    """The keys of a tensor's words from word ``first`` on and of the ones after them, and where the former end."""
    high = first // COUNTERS
    keys = [*noise_keys(seed, name, high), *noise_keys(seed, name, high + 1), high % COUNTERS, high // COUNTERS]
    return np.array(keys, np.uint32)


def _numbers(operand: RawOperand | None) -> tuple[int, int]:
    return (operand.at, strips.CODES[operand.dtype]) if operand is not None else (0, strips.NO_TENSOR)


def _measures(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], alpha: float) -> Measures:
    count = counts.tolist()
    nonfinite = count[strips.NAN] + count[strips.INFINITE]
    at_least = [*count[strips.ULPS :], 0]
    v_sq, t_sq, v_t, moved_v, error_sq = sums.tolist()
    return Measures(
        v_sq,
        t_sq,
        v_t,
        moved_v,
        error_sq,
        v_max=float(np.int32(count[strips.V_MAX_BITS]).view(np.float32)),
        nonzero=count[strips.NONZERO],
        changed=count[strips.CHANGED],
        absorbed=count[strips.ABSORBED] if alpha else 0,
        ulps_max=count[strips.ULPS_MAX],
        inexact=count[strips.INEXACT],
        overflowed=count[strips.OVERFLOWED],
        nan=count[strips.NAN],
        infinite=count[strips.INFINITE],
        first_nonfinite=count[strips.FIRST] if nonfinite else None,
        ulps=tuple(low - high for low, high in pairwise(at_least)),
    )
