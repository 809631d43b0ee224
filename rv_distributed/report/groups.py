"""Tensors by layer and module, and what is known of each such group: sums of their rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from rv_distributed.checkpoint.table import TensorRow
from rv_distributed.results import ratio

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d+)\.(.+)$")
_EXPERT: Final = re.compile(r"\bexperts\.\d+\.")
_LEADING: Final = re.compile(r"^(?:model|transformer|language_model)\.")
_TRAILING: Final = re.compile(r"\.weight$")

#: Of the entries of `TensorRow.ulps`.
ULPS_LABELS: Final = ("1", "2", "3–4", "5–8", "9–16", "17–64", "65–256", "> 256")


class Place(NamedTuple):
    """Where in the model a tensor lies."""

    layer: int | None
    module: str
    """Its name without the layer; all experts of a layer are one module."""


def place_of(name: str) -> Place:
    """``model.layers.12.mlp.up_proj.weight`` lies in layer 12, in mlp.up_proj."""
    found = _LAYER.search(name)
    module = found[2] if found else _LEADING.sub("", name)
    return Place(int(found[1]) if found else None, _TRAILING.sub("", _EXPERT.sub("experts.*.", module)))


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
        v_sq = (row.v_norm or 0.0) ** 2
        intended_sq = v_sq * (row.alpha or 0.0) ** 2
        self.v_sq += v_sq
        self.t_sq += (row.t_norm or 0.0) ** 2
        self.moved_v += (row.realised_alpha or 0.0) * v_sq
        self.error_sq += (row.relative_error or 0.0) ** 2 * intended_sq
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


def _root(value: float | None) -> float | None:
    return math.sqrt(value) if finite(value) is not None and value is not None else None
