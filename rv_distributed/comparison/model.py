"""What differs between two checkpoints, by tensor, by layer and in all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rv_distributed.checkpoint.names import place_of
from rv_distributed.measures import Measures, largest
from rv_distributed.results import ratio


@dataclass(slots=True)
class Sums:
    """Sums over elements of A and B; those of products are not finite where an element is not."""

    tensors: int = 0
    elements: int = 0
    differing: int = 0
    """Elements whose value in A is not that in B."""
    nonfinite: int = 0
    """Elements that are NaN or infinite in A, in B, or in A − B, which may overflow. 0 where bytes are compared."""
    d_sq: float = 0.0
    """Σ (a − b)²."""
    b_sq: float = 0.0
    d_b: float = 0.0
    """Σ (a − b)·b."""
    d_max: float = 0.0
    """max |a − b|."""

    def add(self, other: Sums) -> None:
        """Take the sums of other elements in."""
        self.tensors += other.tensors
        self.elements += other.elements
        self.differing += other.differing
        self.nonfinite += other.nonfinite
        self.d_sq += other.d_sq
        self.b_sq += other.b_sq
        self.d_b += other.d_b
        self.d_max = largest((self.d_max, other.d_max))

    @property
    def a_norm(self) -> float | None:
        """‖A‖₂; None where it is not finite, as for the others."""
        return _root(self.d_sq + 2 * self.d_b + self.b_sq)

    @property
    def b_norm(self) -> float | None:
        return _root(self.b_sq)

    @property
    def norm(self) -> float | None:
        """‖A − B‖₂."""
        return _root(self.d_sq)

    @property
    def relative(self) -> float | None:
        """‖A − B‖₂ / ‖B‖₂; None where that is 0."""
        return None if self.norm is None or self.b_norm is None else ratio(self.norm, self.b_norm)

    @property
    def cosine(self) -> float | None:
        """Between A and B; None where one is 0."""
        if self.a_norm is None or self.b_norm is None or self.norm is None:
            return None
        return 1.0 if self.norm == 0 and self.b_norm else ratio(self.d_b + self.b_sq, self.a_norm * self.b_norm)

    @property
    def largest(self) -> float | None:
        """max |a − b|."""
        return self.d_max if math.isfinite(self.d_max) else None

    @property
    def fraction(self) -> float:
        """Share of the elements that differ."""
        return self.differing / max(1, self.elements)


class TensorDiff(NamedTuple):
    """A tensor that both checkpoints have in one shape."""

    name: str
    a_dtype: str
    b_dtype: str
    shape: tuple[int, ...]
    is_measured: bool
    """Whether arithmetic reads its dtypes; else elements are compared byte by byte, and there are no norms."""
    sums: Sums


class Unlike(NamedTuple):
    """A tensor that both have, but not in a form that can be compared."""

    name: str
    a: str
    """Its dtype and shape in A."""
    b: str


class LayerDiff(NamedTuple):
    """One layer of one stack; what lies in none has the layer None."""

    stack: str
    layer: int | None
    sums: Sums


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs between the checkpoints A and B."""

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    """In B's order."""
    unlike: tuple[Unlike, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether both have the same tensors, in the same dtypes and shapes, with the same values."""
        alike = all(tensor.a_dtype == tensor.b_dtype and not tensor.sums.differing for tensor in self.tensors)
        return alike and not (self.unlike or self.only_in_a or self.only_in_b)

    @property
    def total(self) -> Sums:
        """Of all tensors that can be compared."""
        return _total(tensor.sums for tensor in self.tensors)

    @property
    def layers(self) -> list[LayerDiff]:
        """By stack and layer; first what lies in none."""
        found: dict[tuple[str, int | None], Sums] = {}
        for tensor in self.tensors:
            place = place_of(tensor.name)
            key = (place.stack, place.layer) if place.layer is not None else ("", None)
            found.setdefault(key, Sums()).add(tensor.sums)
        order = sorted(found, key=lambda key: (key[0], -1 if key[1] is None else key[1]))
        return [LayerDiff(*key, found[key]) for key in order]

    def most_changed(self, count: int) -> list[TensorDiff]:
        """The tensors that differ most, relative to their size; those without norms after the others."""
        changed = [tensor for tensor in self.tensors if tensor.sums.differing]
        return sorted(changed, key=lambda tensor: -(tensor.sums.relative or 0.0))[:count]


def sums_of(measures: Measures, elements: int) -> Sums:
    """The sums of one tensor, of which A − B was measured as v, B as t, and B + (A − B) as o."""
    m = measures
    return Sums(1, elements, m.nonzero, m.nan + m.infinite, m.v_sq, m.t_sq, m.v_t, m.v_max)


def _total(parts: Iterable[Sums]) -> Sums:
    total = Sums()
    for part in parts:
        total.add(part)
    return total


def _root(square: float) -> float | None:
    # Of numbers that cancel out, less than nothing may be left.
    return math.sqrt(max(0.0, square)) if math.isfinite(square) else None
