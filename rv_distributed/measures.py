"""What is measured while a tensor is computed, and how it adds up."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Measures(NamedTuple):
    """What one block tells of the vector ``v`` and the target ``t``; blocks are added up by `plus`.

    ``v`` is ``d`` when the run has one vector, and ``acc − t`` when it has several.
    """

    v_sq: float = 0.0
    """Σ v². Summed in float32 inside a block, in float64 over blocks."""
    t_sq: float = 0.0
    """Σ t²."""
    v_max: float = 0.0
    """max |v|."""
    changed: int = 0
    """Elements whose bits differ from the target's (values, when the dtypes differ); non-zero ones of a
    vector."""
    inexact: int = 0
    """Elements of a stored vector that its dtype could not hold exactly."""
    nonfinite: int = 0
    """Elements of the output that are NaN or infinite."""
    first_nonfinite: int | None = None
    """Index of the first of them."""

    def plus(self, other: Measures) -> Measures:
        """The measures of both; ``other`` comes later in the tensor."""
        return Measures(
            self.v_sq + other.v_sq,
            self.t_sq + other.t_sq,
            largest((self.v_max, other.v_max)),
            self.changed + other.changed,
            self.inexact + other.inexact,
            self.nonfinite + other.nonfinite,
            other.first_nonfinite if self.first_nonfinite is None else self.first_nonfinite,
        )


def largest(values: Iterable[float]) -> float:
    """The largest of some absolute values: 0 of none, NaN when one of them is."""
    found = 0.0
    for value in values:
        if math.isnan(value):
            return value
        found = max(found, value)
    return found
