"""Tensors by layer and module, and what is known of each such group: sums of their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from rv_distributed.checkpoint.names import place_of
from rv_distributed.checkpoint.table import TensorRow
from rv_distributed.results import ratio

#: Of the entries of `TensorRow.ulps`.
ULPS_LABELS: Final = ("1", "2", "3–4", "5–8", "9–16", "17–64", "65–256", "> 256")


@dataclass(slots=True)
class Group:
    """Sums over some computed tensors. What is not finite, or was not measured, makes what depends on it None."""

    v_sq: float = 0.0
    t_sq: float = 0.0
    moved_v: float = 0.0
    error_sq: float = 0.0
    intended_sq: float = 0.0
    nonzero: int = 0
    changed: int = 0
    absorbed: int = 0
    elements: int = 0

    def add(self, row: TensorRow) -> None:
        """``row`` is of a tensor that was measured."""
        v_sq = _square(row.v_norm)
        intended_sq = v_sq * _square(row.alpha)
        self.v_sq += v_sq
        self.t_sq += _square(row.t_norm)
        # What was not measured is not 0, unless it has no weight.
        if v_sq:
            self.moved_v += (math.nan if row.realised_alpha is None else row.realised_alpha) * v_sq
        if intended_sq:
            self.error_sq += (math.nan if row.relative_error is None else _square(row.relative_error)) * intended_sq
        self.intended_sq += intended_sq
        self.nonzero += row.nonzero or 0
        self.changed += row.changed or 0
        self.absorbed += row.absorbed or 0
        self.elements += math.prod(row.shape)

    @property
    def v_t_ratio(self) -> float | None:
        return _root(ratio(self.v_sq, self.t_sq))

    @property
    def realised_alpha(self) -> float | None:
        return finite(ratio(self.moved_v, self.v_sq))

    @property
    def relative_error(self) -> float | None:
        return _root(ratio(self.error_sq, self.intended_sq))

    @property
    def absorbed_fraction(self) -> float | None:
        return ratio(self.absorbed, self.nonzero)

    @property
    def changed_fraction(self) -> float | None:
        return ratio(self.changed, self.elements)


_Key = TypeVar("_Key")


def group_by(rows: Iterable[TensorRow], key: Callable[[TensorRow], _Key]) -> dict[_Key, Group]:
    """The measured rows, added up by a key; groups in the order of their first rows."""
    groups: dict[_Key, Group] = {}
    for row in rows:
        if row.v_norm is not None:
            groups.setdefault(key(row), Group()).add(row)
    return groups


class Layer(NamedTuple):
    """One layer of one stack."""

    stack: str
    number: int


def by_layer(rows: Iterable[TensorRow]) -> tuple[dict[Layer, Group], Group | None]:
    """The measured rows by layer, in order, and all those that lie in none."""
    groups = group_by(rows, lambda row: place_of(row.name)[::2])
    layers = {Layer(stack, number): group for (number, stack), group in groups.items() if number is not None}
    return {layer: layers[layer] for layer in sorted(layers)}, groups.get((None, ""))


def longest(groups: dict[str, Group], count: int) -> list[str]:
    """The keys of the groups with the longest vectors, in the order of the groups."""
    if len(groups) <= count:
        return list(groups)
    kept = set(sorted(groups, key=lambda key: finite(groups[key].v_sq) or 0.0, reverse=True)[:count])
    return [key for key in groups if key in kept]


def ulps_of(rows: Iterable[TensorRow]) -> list[int]:
    """The distribution of changes over all tensors; empty where it was not measured."""
    found = [row.ulps for row in rows if row.ulps is not None]
    return [sum(column) for column in zip(*found, strict=True)]


def largest_vectors(rows: Sequence[TensorRow], count: int = 20) -> list[TensorRow]:
    """The measured tensors whose vector is longest."""
    measured = [row for row in rows if row.v_norm is not None and math.isfinite(row.v_norm)]
    return sorted(measured, key=lambda row: row.v_norm or 0.0, reverse=True)[:count]


def finite(value: float | None) -> float | None:
    """``value``, if there is one that can be drawn."""
    return value if value is not None and math.isfinite(value) else None


def _square(value: float | None) -> float:
    # Not ``** 2``, which raises where a product is infinite.
    return value * value if value is not None else 0.0


def _root(value: float | None) -> float | None:
    return math.sqrt(value) if finite(value) is not None and value is not None else None
