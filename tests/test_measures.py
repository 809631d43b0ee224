"""How measures of blocks and tensors add up, NaN included."""

from __future__ import annotations

import math
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rv_distributed.measures import Measures, add_up, largest


@pytest.mark.parametrize("values", [[math.nan], [math.nan, 1.0], [1.0, math.nan], [math.inf, math.nan, 2.0]], ids=str)
def test_the_largest_of_values_with_nan_is_nan_wherever_it_stands(values: list[float]) -> None:
    assert math.isnan(largest(values))
    assert math.isnan(largest(iter(values)))


@pytest.mark.parametrize(
    ("values", "expected"), [([], 0.0), ([0.0], 0.0), ([1.0, 3.0, 2.0], 3.0), ([1.0, math.inf], math.inf)], ids=str
)
def test_the_largest_of_numbers_is_their_maximum_and_0_of_none(values: list[float], expected: float) -> None:
    assert largest(values) == expected


def test_measures_of_blocks_add_up() -> None:
    one = Measures(1.0, 2.0, 3.0, 4.0, 5.0, 0.5, 6, 5, 1, 7, 1, 0, 0, 0, None, (1, 2, 0, 0, 0, 0, 0, 0))
    other = Measures(0.25, 0.5, 0.25, 0.5, 0.25, 0.75, 4, 3, 1, 2, 0, 1, 1, 2, 9, (3, 0, 0, 0, 0, 0, 0, 1))
    total = Measures(1.25, 2.5, 3.25, 4.5, 5.25, 0.75, 10, 8, 2, 7, 1, 1, 1, 2, 9, (4, 2, 0, 0, 0, 0, 0, 1))
    assert one.plus(other) == total
    assert other.plus(one)._replace(first_nonfinite=9) == total


def test_the_first_that_is_not_finite_is_that_of_the_first_block_that_has_one() -> None:
    assert Measures().plus(Measures(first_nonfinite=3)).plus(Measures(first_nonfinite=1)).first_nonfinite == 3
    assert Measures(first_nonfinite=3).moved(100).first_nonfinite == 103
    assert Measures().moved(100).first_nonfinite is None


def test_a_nan_in_one_block_stays_in_the_sum_of_blocks_in_either_order() -> None:
    broken, whole = (
        Measures(v_sq=math.nan, t_sq=1.0, v_max=math.nan, changed=1),
        Measures(2.0, 3.0, v_max=4.0, changed=5),
    )
    for total in (broken.plus(whole), whole.plus(broken)):
        assert math.isnan(total.v_sq)
        assert math.isnan(total.v_max)
        assert (total.t_sq, total.changed) == (4.0, 6)


def test_nothing_measured_adds_nothing() -> None:
    measured = Measures(1.0, 2.0, 3.0, 4.0, 5.0, changed=6)
    assert measured.plus(Measures()) == Measures().plus(measured) == measured
    assert add_up([]) == Measures()
    assert add_up([(5, measured)]) == measured


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=300), st.integers(0, 1000), st.integers(0, 5))
def test_the_sum_of_blocks_does_not_depend_on_the_pieces_that_they_lie_in(
    values: list[float], first: int, power: int
) -> None:
    """Pieces of 2ᵏ blocks, which begin at multiples of that."""
    blocks = [(first + number, Measures(v_sq=value, t_sq=1 / value)) for number, value in enumerate(values)]
    whole = add_up(blocks)
    size = 1 << power
    pieces = [(number * size, add_up(of)) for number, of in groupby(blocks, lambda leaf: leaf[0] // size)]
    assert add_up(pieces) == whole
    assert math.isclose(whole.v_sq, math.fsum(values), rel_tol=1e-12)
