"""How measures of blocks and tensors add up, NaN included."""

from __future__ import annotations

import math

import pytest

from rv_distributed.measures import Measures, largest


@pytest.mark.parametrize("values", [[math.nan], [math.nan, 1.0], [1.0, math.nan], [math.inf, math.nan, 2.0]], ids=str)
def test_the_largest_of_values_with_nan_is_nan_wherever_it_stands(values: list[float]) -> None:
    assert math.isnan(largest(values))
    assert math.isnan(largest(iter(values)))


@pytest.mark.parametrize(
    ("values", "expected"), [([], 0.0), ([0.0], 0.0), ([1.0, 3.0, 2.0], 3.0), ([1.0, math.inf], math.inf)], ids=str
)
def test_the_largest_of_numbers_is_their_maximum_and_0_of_none(values: list[float], expected: float) -> None:
    assert largest(values) == expected


def test_a_nan_in_one_block_stays_in_the_sum_of_blocks_in_either_order() -> None:
    broken, whole = Measures(math.nan, 1.0, math.nan, 1, 2), Measures(2.0, 3.0, 4.0, 5, 6)
    for total in (broken.plus(whole), whole.plus(broken)):
        assert math.isnan(total.v_sq)
        assert math.isnan(total.v_max)
        assert (total.t_sq, total.changed, total.inexact) == (4.0, 6, 8)


def test_nothing_measured_adds_nothing() -> None:
    measured = Measures(1.0, 2.0, 3.0, 4, 5)
    assert measured.plus(Measures()) == Measures().plus(measured) == measured
