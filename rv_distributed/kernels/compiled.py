"""Blocks of one stream through the compiled kernel: for the processor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from rv_distributed.kernels import strips
from rv_distributed.kernels.keys import COUNTERS, noise_keys
from rv_distributed.measures import Measures
from rv_distributed.recipe import Arithmetic, Stats, Weights

Bytes = npt.NDArray[np.uint8]
_LEVELS: Final = {"none": strips.NOTHING, "basic": strips.BASIC, "full": strips.FULL}


class RawOperand(NamedTuple):
    """Elements of an operand, as bytes."""

    at: int
    """Its first byte in the arena."""
    dtype: str
    """By its safetensors name."""
    fd: int = -1
    """A file in whose page cache they are looked for: then each block of them is copied to ``at``."""
    offset: int = 0
    """Where they begin in that file."""


class CompiledCombiner:
    """Scratch space of one thread, and the arithmetic of `rv_distributed.kernels.strips` over it.

    ``weighted`` as of `Combiner`.
    """

    def __init__(self, *, outputs: int, weighted: bool, stats: Stats, arithmetic: Arithmetic) -> None:
        self._level = _LEVELS[stats]
        self._arithmetic = arithmetic
        self._weighted = weighted
        self._dtype = np.dtype(arithmetic.compute_dtype)
        self._scratch = np.empty((3 + 2 * outputs, strips.STRIP), self._dtype)
        self._spare = np.empty((3, 8 * strips.STRIP), np.uint8)
        self._steps = np.empty(strips.STRIP, np.uint16)

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
        sizes: Sequence[int],
    ) -> list[list[Measures]]:
        """Fill every row of ``outs`` with ``target + Σ αₖ·vₖ``, or without a target with the vector or the models' sum.

        They are blocks of ``sizes`` elements of ``dtype``, one after another, from byte ``at`` on, which is a multiple
        of its size, and from element ``first`` of the tensor ``name``; ``weights`` has those of each output, and
        ``outs`` is contiguous. Returns the measures of each, by block: of fewer blocks when the page cache does not
        hold an operand. Bits and measures are those of `Combiner`.
        """
        sums = np.zeros((len(sizes), len(outs), strips.SUMS))
        counts = np.zeros((len(sizes), len(outs), strips.COUNTS), np.int64)
        operands = np.array([_numbers(of) for of in (target, *chain.from_iterable(vectors))], np.int64)
        made = np.zeros(1, np.int64)
        strips.combine_blocks(
            arena,
            operands,
            np.array([of.alphas for of in weights], self._dtype).reshape(len(outs), -1),
            np.array([of[1:] for of in weights if self._arithmetic.order != "each"], self._dtype).reshape(-1, 2),
            self._arithmetic.order == "fused",
            outs,
            at,
            strips.CODES[dtype],
            first,
            np.array(sizes, np.int64),
            self._keys(name if target else f"vector of {name}", first, dtype),
            self._weighted,
            self._level,
            self._scratch,
            self._spare,
            self._steps,
            sums,
            counts,
            np.empty(len(operands) + 2, np.int64),
            np.empty((len(vectors), 4), np.int64),
            made,
        )
        scales = [of.alphas[0] if of.alphas and target and not self._weighted else 1.0 for of in weights]
        return [
            [self._measures(*of) for of in zip(sums_of, counts_of, scales, strict=True)]
            for sums_of, counts_of in zip(sums[: made[0]].tolist(), counts[: made[0]].tolist(), strict=True)
        ]

    def _keys(self, name: str, first: int, dtype: str) -> npt.NDArray[np.uint32]:
        if self._arithmetic.rounding == "nearest":
            return np.empty(0, np.uint32)
        halves = dtype == "BF16" and self._dtype == np.float32
        return word_keys(self._arithmetic.seed, name, first // 2 if halves else first)

    def _measures(self, sums: list[float], count: list[int], alpha: float) -> Measures:
        nonfinite = count[strips.NAN] + count[strips.INFINITE]
        at_least = [*count[strips.ULPS :], 0]
        v_sq, t_sq, v_t, moved_v, error_sq = sums
        return Measures(
            v_sq,
            t_sq,
            v_t,
            moved_v,
            error_sq,
            v_max=float(np.array(count[strips.V_MAX_BITS], f"i{self._dtype.itemsize}").view(self._dtype)),
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


def word_keys(seed: int, name: str, first: int) -> npt.NDArray[np.uint32]:
    """The keys of a tensor's words from word ``first`` on and of the ones after them, and where the former end."""
    high = first // COUNTERS
    keys = [*noise_keys(seed, name, high), *noise_keys(seed, name, high + 1), high % COUNTERS, high // COUNTERS]
    return np.array(keys, np.uint32)


def _numbers(operand: RawOperand | None) -> tuple[int, int, int, int]:
    if operand is None:
        return 0, strips.NO_TENSOR, -1, 0
    return operand.at, strips.CODES[operand.dtype], operand.fd, operand.offset
