"""Accuracy with its standard error, and the difference between two models that answered the same items.

The standard error of a mean is s/√n, with the sample's standard deviation s (n − 1 in its denominator), as the harness
gives it. Models are compared item by item, since most of the variance is that of the items and cancels (Miller, "Adding
Error Bars to Evals", arXiv 2411.00640): the interval is the percentile bootstrap of the mean difference over items
(Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13), and where every score is 0 or 1 the
p-value is that of McNemar's test in its exact form (Psychometrika 12, 1947): twice the binomial tail of the smaller of
the two counts of items that only one model got right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 10_000
FORMULA: Final = (
    f"accuracy: mean over items, error s/√n; difference to the target: paired over items, {CONFIDENCE:.0%} percentile "
    f"bootstrap of {RESAMPLES:,} resamples; p: exact McNemar test"
)
#: Differences drawn at once, so that memory does not depend on the number of items.
_DRAWN: Final = 10_000_000


class Estimate(NamedTuple):
    """The mean score of a model."""

    mean: float
    stderr: float | None
    """None of a single item."""
    items: int


class Difference(NamedTuple):
    """How much more a model scores than the target, over the same items."""

    mean: float
    low: float
    """Of the interval with `CONFIDENCE`."""
    high: float
    gained: int
    """Items with a higher score than the target's."""
    lost: int
    p: float | None
    """Of McNemar's exact test; None where scores are not 0 or 1."""


def estimate(scores: Sequence[float]) -> Estimate:
    """The mean of at least one score."""
    stderr = float(np.std(scores, ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return Estimate(float(np.mean(scores)), stderr, len(scores))


def difference(scores: Sequence[float], target: Sequence[float], *, seed: int = 0) -> Difference:
    """Of two models' scores of the same items, in the same order."""
    gaps = np.asarray(scores, np.float64) - np.asarray(target, np.float64)
    low, high = _interval(gaps, seed)
    gained, lost = int(np.count_nonzero(gaps > 0)), int(np.count_nonzero(gaps < 0))
    binary = set(np.unique(np.concatenate([scores, target]))) <= {0.0, 1.0}
    return Difference(float(gaps.mean()), low, high, gained, lost, mcnemar(gained, lost) if binary else None)


def _interval(gaps: np.typing.NDArray[np.float64], seed: int) -> tuple[float, float]:
    """The percentile bootstrap of the mean. Resampled are the counts of equal values, which is the same and faster:
    differences of right and wrong have but three."""
    values, counts = np.unique(gaps, return_counts=True)
    rng, means, chunk = np.random.default_rng(seed), [], max(1, _DRAWN // len(values))
    for start in range(0, RESAMPLES, chunk):
        drawn = rng.multinomial(len(gaps), counts / len(gaps), min(chunk, RESAMPLES - start))
        means.append(drawn @ values / len(gaps))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value of the exact test."""
    count, smaller = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(smaller + 1))
    return float(min(1.0, 2 * tail / 2**count))
