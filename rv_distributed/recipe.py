"""What to compute: ``O = T + Σ αₖ·vₖ`` or ``V = A − B``, over checkpoints named by path.

Made from command line flags or Python arguments; turned into a plan by `rv_distributed.plan.make_plan`
once the checkpoints are open.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rv_distributed.errors import UsageError

Operation = Literal["extract", "apply", "transfer"]
ComputeDType = Literal["float32", "float64"]
Rounding = Literal["nearest", "stochastic"]
Stats = Literal["full", "basic", "none"]
VocabMismatch = Literal["error", "overlap"]
Missing = Literal["error", "copy"]
Role = Literal["target", "donor", "reference", "vector"]


class Arithmetic(NamedTuple):
    """How values are computed and rounded; the same for all tensors of a plan."""

    compute_dtype: ComputeDType
    """In which differences, products and sums are rounded."""
    rounding: Rounding
    """To an output's dtype of 16 bits; to float32 it is always to nearest."""
    seed: int
    """Of stochastic rounding: 0 to 2⁶⁴ − 1."""


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector to add: stored, or the difference of two checkpoints."""

    plus: str
    """The stored vector, or the donor."""
    minus: str | None = None
    """The reference; None for a stored vector."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A linear combination of checkpoints, and the outputs wanted of it."""

    operation: Operation
    target: str | None
    """The model that receives the vectors; None to extract."""
    vectors: tuple[Vector, ...]
    """In the order in which they are added."""
    alphas: tuple[tuple[float, ...], ...]
    """One tuple an output, with one alpha a vector. All outputs are made in one pass."""

    def __post_init__(self) -> None:
        if not self.vectors:
            raise UsageError("nothing to add: give at least one vector")
        if not self.alphas or any(len(row) != len(self.vectors) for row in self.alphas):
            raise UsageError("give one alpha for each vector")
        for row in self.alphas:
            for alpha in row:
                if not math.isfinite(alpha) or not math.isfinite(as_float32(alpha)):
                    raise UsageError(f"alpha {alpha} is not a finite float32")

    @property
    def used(self) -> tuple[int, ...]:
        """The vectors that some output gets, by their index: those whose alpha is not always 0."""
        return tuple(
            number
            for number in range(len(self.vectors))
            if self.target is None or any(as_float32(row[number]) != 0.0 for row in self.alphas)
        )

    @property
    def frame(self) -> str:
        """The checkpoint that gives names, shapes and small files: the target, or the donor of an extract."""
        return self.target if self.target is not None else self.vectors[0].plus

    @property
    def roles(self) -> tuple[tuple[Role, str], ...]:
        """All checkpoints with their roles, used or not, in their order."""
        roles: list[tuple[Role, str]] = [("target", self.target)] if self.target is not None else []
        for vector in self.vectors:
            if vector.minus is None:
                roles.append(("vector", vector.plus))
            else:
                roles += [("donor", vector.plus), ("reference", vector.minus)]
        return tuple(roles)

    def giver(self, role: Role | None) -> str:
        """The checkpoint whose small files go with the outputs: that of a role, or the frame.

        Raises UsageError when the role is nobody's, or several have it.
        """
        if role is None:
            return self.frame
        found = [name for other, name in self.roles if other == role]
        if len(found) != 1:
            has = ", ".join(dict.fromkeys(other for other, _ in self.roles))
            number = "several inputs are that" if found else f"{self.operation} has {has}"
            raise UsageError(f"--sidecars-from {role}: {number}")
        return found[0]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The checkpoints that are used, in the order of their roles, each once."""
        names = [self.target] + [name for n in self.used for name in (self.vectors[n].plus, self.vectors[n].minus)]
        return tuple(dict.fromkeys(name for name in names if name is not None))


def show_alpha(alpha: float) -> str:
    """The shortest decimal that is ``alpha``, in float32 or else in float64: 0.7, not 0.699999988."""
    texts = (f"{alpha:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if alpha in (as_float32(float(text)), float(text)))


def as_float32(alpha: float) -> float:
    """``alpha`` rounded to float32, the precision in which it is used; infinity where it overflows."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", alpha))[0])
    except OverflowError:
        return math.inf
