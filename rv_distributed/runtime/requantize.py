"""Making the parts of tensors that are written as FP8 again: a row of blocks at a time, on the processor.

The scale of a block depends on all of its elements, so a band is computed whole by whoever makes some of it. Where a
piece begins in the middle of one, that is once more than needed, and its bytes are the same; where a chunk ends in the
middle of one, the rest is kept for the next chunk. Its scales are part of the result of the piece that it begins in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.sources import Source
from rv_distributed.measures import Measures
from rv_distributed.plan import Requantized, Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.chunks import BandScales, Computed, Part
from rv_distributed.runtime.decoding import widened
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerConfig

Floats = npt.NDArray[Any]


class Requantizer:
    """Computes bands for one stream. Belongs to one thread at a time."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._dtype = np.dtype(config.arithmetic.compute_dtype)
        self._rest = np.empty((len(config.numbers), 0), np.uint8)

    def compute(
        self, span: Span, how: Requantized, part: Part, arena: Arena, outs: Bytes, start: int
    ) -> Iterator[Computed]:
        """Fill the part's bytes in ``outs``: the window of the file from byte ``start``; yields band by band."""
        if part.carried:
            stop = part.at + part.carried
            outs[:, part.at : stop] = self._rest[:, : part.carried]
            self._rest = self._rest[:, part.carried :]
            yield Computed(part.at, stop, ())
        end = part.at + part.nbytes
        # Where the first band begins, which may be before the window.
        place = part.at + part.carried - part.skip
        done = 0
        while done < part.elements:
            first = part.first + done
            count = how.band(first)[1] - first
            elements, measures, scales = self._make(span, how, part, arena, done, count)
            at = place + done
            low, high = max(at, part.at), min(at + count, end)
            outs[:, low:high] = elements[:, low - at : high - at]
            self._rest = elements[:, high - at :]
            if done == 0 and part.skip > 0:
                # Measured, like its scales, with the piece that it begins in.
                yield Computed(low, high, ())
            else:
                leaves = tuple((((start + at) // BLOCK_BYTES, found),) for found in measures)
                yield Computed(low, high, leaves, BandScales(how.number(first), scales))
            done += count

    def _make(
        self, span: Span, how: Requantized, part: Part, arena: Arena, done: int, count: int
    ) -> tuple[Bytes, tuple[Measures, ...], tuple[bytes, ...]]:
        """The elements, the measures and the scales of a band, by output; ``done`` is its first element in the part."""
        from rv_distributed.kernels import bands

        def values(place: int, source: Source | None) -> Floats:
            if source is None:
                return np.zeros(count, self._dtype)
            item = item_bytes(source.dtype)
            low, high = place + done * item, place + (done + count) * item
            arena.need(low, high - low)
            return widened(arena.array[low:high], source.dtype).astype(self._dtype, copy=False)

        first = part.first + done
        weights = [span.weights[number] for number in self._config.numbers]
        t = values(part.target, span.target)
        d = np.zeros_like(t)
        sums = _Sums(t, weights, self._config)
        with np.errstate(all="ignore"):
            for number, (vector, (plus_at, minus_at)) in enumerate(zip(span.vectors, part.vectors, strict=True)):
                d = values(plus_at, vector.plus) - values(minus_at, vector.minus)
                sums.add(number, d)
            totals, moved = sums.finished()
            words = self._words(span, first, count)
            elements = np.empty((len(weights), count), np.uint8)
            measures, scales = [], []
            for number, (total, of) in enumerate(zip(totals, weights, strict=True)):
                of_total, of_t = (array.astype(np.float32, copy=False) for array in (total, t))
                band = bands.quantize(of_total, how.columns, how.block[1], how.scale_dtype, how.are_powers_of_2, words)
                elements[number] = band.elements
                scales.append(band.scales)
                v = (moved[number] if self._config.weighted else d).astype(np.float32, copy=False)
                alpha = 1.0 if self._config.weighted or not of.alphas else of.alphas[0]
                stats = self._config.stats if span.vectors else "none"
                measures.append(bands.measure(band, of_t, v, alpha, stats).moved(first))
        return elements, tuple(measures), tuple(scales)

    def _words(self, span: Span, first: int, count: int) -> npt.NDArray[np.uint32]:
        """The random bits of some elements; none for rounding to nearest."""
        arithmetic = self._config.arithmetic
        if arithmetic.rounding == "nearest":
            return np.empty(0, np.uint32)
        from rv_distributed.kernels import strips
        from rv_distributed.kernels.compiled import word_keys

        words = np.empty(count, np.uint32)
        strips.noise(first, word_keys(arithmetic.seed, span.name, first), words)
        return words


class _Sums:
    """The arithmetic of `rv_distributed.kernels.combine` over one band, in every output."""

    def __init__(self, t: Floats, weights: Sequence[Weights], config: WorkerConfig) -> None:
        self._t, self._weights, self._order = t, weights, config.arithmetic.order
        self._weighted = config.weighted
        zeros = np.zeros_like(t)
        self._moved = [zeros] * len(weights)
        self._totals = [t] * len(weights)

    def add(self, number: int, d: Floats) -> None:
        """Add vector ``number`` of the tensor."""
        for output, of in enumerate(self._weights):
            if alpha := of.alphas[number]:
                moved = self._moved[output]
                if self._order == "fused" and d.dtype == np.float32:
                    # Float64 holds every product of two float32.
                    self._moved[output] = (d.astype(np.float64) * alpha + moved).astype(np.float32)
                    continue
                product = d * d.dtype.type(alpha)
                if self._weighted:
                    self._moved[output] = moved + product
                if self._order == "each":
                    self._totals[output] = self._totals[output] + product

    def finished(self) -> tuple[list[Floats], list[Floats]]:
        """The sums with the target, and the vectors' alone where that is what is measured."""
        if self._order == "each":
            return self._totals, self._moved
        kind = self._t.dtype.type
        moved = [v / kind(of.divisor) * kind(of.scale) for v, of in zip(self._moved, self._weights, strict=True)]
        return [self._t + v if of.moves else self._t for v, of in zip(moved, self._weights, strict=True)], moved
