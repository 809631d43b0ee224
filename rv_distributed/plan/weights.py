"""The numbers that each tensor is computed with: alphas of vectors, which may depend on its name and its layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rv_distributed.checkpoint.names import place_of
from rv_distributed.errors import UsageError, one_line
from rv_distributed.recipe import Alpha, ByTensor, ComputeDType, Recipe, Weights, as_float32

#: A sum of alphas below this does not divide the vectors that are added to a target, as in mergekit.
_LEAST_DIVISOR: Final = 1e-8


class Weigher:
    """The weights of tensors, in every output of a recipe. ``names`` are those of all tensors of the frame."""

    def __init__(self, recipe: Recipe, names: Iterable[str], dtype: ComputeDType) -> None:
        self._recipe = recipe
        self._dtype = dtype
        by_tensor = [alpha for row in (*recipe.alphas, (recipe.scale,)) for alpha in row if isinstance(alpha, ByTensor)]
        self._is_varied = bool(by_tensor)
        has_gradient = any(len(choice.values) > 1 for alpha in by_tensor for choice in alpha.choices)
        self._last_layers = _last_layers(names) if has_gradient else {}
        self._kept: dict[object, tuple[Weights, ...]] = {}

    @property
    def stated(self) -> tuple[tuple[float | None, ...], ...]:
        """The recipe's alphas, rounded; None where one depends on the tensor."""
        return tuple(
            tuple(None if isinstance(alpha, ByTensor) else _rounded(alpha, self._dtype) for alpha in row)
            for row in self._recipe.alphas
        )

    def of(self, name: str, vectors: Sequence[int]) -> tuple[Weights, ...]:
        """Those of a tensor that gets ``vectors``, by their index in the recipe: one an output.

        Raises UsageError when alphas that are to be normalized add up to 0.
        """
        key: object = tuple(vectors)
        if self._is_varied:
            depth = self._depth(name)
            rows = [[self._at(row[number], name, depth) for number in vectors] for row in self._recipe.alphas]
            scale = self._at(self._recipe.scale, name, depth)
            key = (key, scale, *map(tuple, rows))
        elif key not in self._kept:
            rows = [[self._at(row[number], name, 0.0) for number in vectors] for row in self._recipe.alphas]
            scale = self._at(self._recipe.scale, name, 0.0)
        if key not in self._kept:
            self._kept[key] = tuple(Weights(tuple(row), self._divisor(name, row), scale) for row in rows)
        return self._kept[key]

    def _at(self, alpha: Alpha, name: str, depth: float) -> float:
        return _rounded(alpha.at(name, depth) if isinstance(alpha, ByTensor) else alpha, self._dtype)

    def _depth(self, name: str) -> float:
        place = place_of(name)
        last = self._last_layers.get(place.stack)
        if place.layer is None or last is None:
            return 0.0
        return place.layer / last if last else 1.0

    def _divisor(self, name: str, alphas: Sequence[float]) -> float:
        if not self._recipe.normalize or not alphas:
            return 1.0
        total = 0.0
        for alpha in alphas:
            total = _rounded(total + alpha, self._dtype)
        if self._recipe.target is not None:
            return total if abs(total) >= _LEAST_DIVISOR else 1.0
        if total == 0.0:
            raise UsageError(f"the weights of {one_line(repr(name))} add up to 0, so they cannot be normalized")
        return total


def _last_layers(names: Iterable[str]) -> dict[str, int]:
    """The number of the last layer of every stack."""
    last: dict[str, int] = {}
    for place in map(place_of, names):
        if place.layer is not None:
            last[place.stack] = max(place.layer, last.get(place.stack, 0))
    return last


def _rounded(alpha: float, dtype: ComputeDType) -> float:
    """``alpha`` as the arithmetic uses it. One that is 0 in float32 is 0: `Recipe.used` goes by that."""
    single = as_float32(alpha)
    return alpha if dtype == "float64" and single else single
