"""A recipe as a file: what was made of one output, in full, so that it can be made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rv_distributed.plan import PlanOptions
from rv_distributed.plan.options import SHARED_OPTIONS
from rv_distributed.recipe import Alpha, ByTensor, Choice, Recipe, Vector

_HEAD: Final = "# What this output was made by. To make it again: rv run rv_recipe.yaml --out OUT\n"


def recipe_text(recipe: Recipe, output: int, options: PlanOptions, uris: Mapping[str, str]) -> str:
    """The recipe of one output as YAML; ``uris`` has the full name of every checkpoint."""
    import yaml

    alphas = recipe.alphas[output]
    document: dict[str, Any] = {"operation": recipe.operation}
    document |= {"target": uris[recipe.target]} if recipe.target is not None else {}
    document |= {"base": uris[recipe.base]} if recipe.base is not None else {}
    document["vectors"] = [
        _vector(vector, alpha, recipe, uris) for vector, alpha in zip(recipe.vectors, alphas, strict=True)
    ]
    if recipe.order != "each":
        document |= {"normalize": recipe.normalize, "scale": _alpha(recipe.scale)}
    document |= {
        **{name: getattr(options, name) for name in SHARED_OPTIONS},
        "max_shard_size": options.max_shard_bytes,
        "key_mapping": dict(options.key_mapping),
    }
    return _HEAD + str(yaml.safe_dump(_escaped(document), sort_keys=False, allow_unicode=True, width=120))


def _vector(vector: Vector, alpha: Alpha, recipe: Recipe, uris: Mapping[str, str]) -> dict[str, Any]:
    if vector.minus is not None:
        fields: dict[str, Any] = {"donor": uris[vector.plus], "reference": uris[vector.minus]}
    else:
        fields = {"model" if recipe.operation == "linear" else "vector": uris[vector.plus]}
    return fields if recipe.operation == "extract" else {**fields, "alpha": _alpha(alpha)}


def _alpha(alpha: Alpha) -> Any:
    if not isinstance(alpha, ByTensor):
        return float(alpha)
    return [_choice(choice) for choice in alpha.choices]


def _choice(choice: Choice) -> dict[str, Any]:
    values = list(map(float, choice.values))
    match = {"match": list(choice.match)} if choice.match else {}
    return {**match, "alpha": values if len(values) > 1 else values[0]}


def _escaped(value: Any) -> Any:
    """The same, so that reading it puts no environment variable in."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value
