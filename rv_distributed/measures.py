"""What is measured while a tensor is computed, and how it adds up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

#: The least steps that an entry of `Measures.ulps` counts; the next one's is where it ends.
ULPS_FROM: Final = (1, 2, 3, 5, 9, 17, 65, 257)
_NO_ULPS: Final = (0,) * len(ULPS_FROM)


class Measures(NamedTuple):
    """What some elements tell of the vector ``v``, the target ``t`` and the output ``o``; all of it adds up.

    ``o`` was to be ``t + αv``. With one vector, ``v`` is ``d`` and α its alpha; with several, ``v`` is their weighted
    sum ``Σ αₖ·dₖ`` and α is 1. Of a stored vector, ``t`` is 0 and α is 1. Sums are in float64. Those marked are
    of ``--stats full`` only, and 0 else.
    """

    v_sq: float = 0.0
    """Σ v²."""
    t_sq: float = 0.0
    """Σ t²."""
    v_t: float = 0.0
    """Σ v·t. Full."""
    moved_v: float = 0.0
    """Σ (o − t)·v. Full."""
    error_sq: float = 0.0
    """Σ ((o − t) − αv)². Full."""
    v_max: float = 0.0
    """max |v|."""
    nonzero: int = 0
    """Elements of v that are not 0."""
    changed: int = 0
    """Elements of o that are not what they would be without v: t, rounded to the output's dtype."""
    absorbed: int = 0
    """Elements that are not changed although αv is not 0."""
    ulps_max: int = 0
    """The most steps from one number of the output's dtype to the next that an element was changed by."""
    inexact: int = 0
    """Elements of a stored vector that its dtype could not hold exactly."""
    overflowed: int = 0
    """Elements of o that are infinite although t and v are finite."""
    nan: int = 0
    """Elements of o that are NaN."""
    infinite: int = 0
    """Elements of o that are infinite."""
    first_nonfinite: int | None = None
    """Index of the first element of o that is NaN or infinite."""
    ulps: tuple[int, ...] = _NO_ULPS
    """Elements changed by as many steps as `ULPS_FROM` says. NaN and infinity are in none. Full."""

    def plus(self, other: Measures) -> Measures:
        """The measures of both; ``other`` comes later in the tensor."""
        return Measures(
            self.v_sq + other.v_sq,
            self.t_sq + other.t_sq,
            self.v_t + other.v_t,
            self.moved_v + other.moved_v,
            self.error_sq + other.error_sq,
            largest((self.v_max, other.v_max)),
            self.nonzero + other.nonzero,
            self.changed + other.changed,
            self.absorbed + other.absorbed,
            max(self.ulps_max, other.ulps_max),
            self.inexact + other.inexact,
            self.overflowed + other.overflowed,
            self.nan + other.nan,
            self.infinite + other.infinite,
            other.first_nonfinite if self.first_nonfinite is None else self.first_nonfinite,
            tuple(map(sum, zip(self.ulps, other.ulps, strict=True))),
        )

    def moved(self, first: int) -> Measures:
        """The same, of elements that begin at element ``first`` of their tensor."""
        if self.first_nonfinite is None:
            return self
        return self._replace(first_nonfinite=first + self.first_nonfinite)


#: Measures, each with the number of the block that it begins with.
Leaf = tuple[int, Measures]


def add_up(leaves: Iterable[Leaf]) -> Measures:
    """Measures of blocks, in their order, added along the binary tree over the blocks' numbers.

    The sums are rounded in the same way however the blocks are dealt out, as long as whole subtrees stay together:
    pieces are 2ᵏ blocks, and begin at multiples of that. A subtree without its other half is its own sum.
    """
    level = list(leaves)
    while len(level) > 1:
        above: list[Leaf] = []
        for number, measures in level:
            if above and above[-1][0] == number // 2:
                above[-1] = (number // 2, above[-1][1].plus(measures))
            else:
                above.append((number // 2, measures))
        level = above
    return level[0][1] if level else Measures()


def largest(values: Iterable[float]) -> float:
    """The largest of some absolute values: 0 of none, NaN when one of them is."""
    found = 0.0
    for value in values:
        if math.isnan(value):
            return value
        found = max(found, value)
    return found
