"""The statistics against other ways to the same numbers."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from rv_distributed.evaluation.statistics import RESAMPLES, difference, estimate, mcnemar


def test_the_error_is_that_of_a_mean() -> None:
    scores = [1.0, 0.0, 1.0, 1.0]
    mean, stderr, items = estimate(scores)
    assert (mean, items) == (0.75, 4)
    # Of right and wrong, √(p(1 − p)/(n − 1)), as the harness has it.
    assert stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert estimate([1.0]) == (1.0, None, 1)


@pytest.mark.parametrize(("gained", "lost"), list(product(range(7), range(7))))
def test_mcnemars_p_is_that_of_counting_every_way_of_tossing_coins(gained: int, lost: int) -> None:
    count = gained + lost
    as_far = sum(abs(2 * sum(toss) - count) >= abs(gained - lost) for toss in product((0, 1), repeat=count))
    assert mcnemar(gained, lost) == pytest.approx(as_far / 2**count)


def test_mcnemars_p_of_many_items_is_a_small_number_and_no_overflow() -> None:
    assert mcnemar(3000, 1000) < 1e-200
    assert mcnemar(2000, 2000) == 1.0


def test_the_interval_is_that_of_resampling_items() -> None:
    rng = np.random.default_rng(5)
    target = (rng.random(400) < 0.4).astype(float)
    moved = np.where(rng.random(400) < 0.3, (rng.random(400) < 0.7).astype(float), target)
    found = difference(moved.tolist(), target.tolist())
    gaps = moved - target
    means = [rng.choice(gaps, len(gaps)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert found.mean == pytest.approx(gaps.mean())
    assert found.low == pytest.approx(low, abs=0.004)
    assert found.high == pytest.approx(high, abs=0.004)
    assert (found.gained, found.lost) == ((gaps > 0).sum(), (gaps < 0).sum())
    assert found == difference(moved.tolist(), target.tolist()), "the same every time"


def test_scores_that_are_no_counts_have_an_interval_and_no_p() -> None:
    rng = np.random.default_rng(6)
    target = rng.random(3000)
    found = difference((target + 0.1).tolist(), target.tolist())
    assert found.p is None
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_models_that_answer_alike_differ_by_nothing() -> None:
    assert difference([1.0, 0.0], [1.0, 0.0]) == (0.0, 0.0, 0.0, 0, 0, 1.0)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 300 samples from a known distribution, about 95 % of the intervals hold its mean."""
    rng = np.random.default_rng(7)
    values, odds = np.array([-1.0, 0.0, 1.0]), np.array([0.1, 0.65, 0.25])
    hits = 0
    for _ in range(300):
        gaps = rng.choice(values, 200, p=odds)
        target = (gaps < 0).astype(float)
        found = difference((target + gaps).tolist(), target.tolist())
        hits += found.low <= 0.15 <= found.high
    assert 270 <= hits <= 298
