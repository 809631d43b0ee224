"""Whether inputs are what they are given as, vectors or models: the manifests of our own outputs tell.

Called when a run is prepared. A sum of models says nothing, as vectors may be summed too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from rv_distributed.checkpoint.manifest import OPERATIONS
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.errors import Problem
from rv_distributed.recipe import Recipe, Role

_INSTEAD: Final[Mapping[Role, str]] = {
    "vector": "Give what rv extract wrote as --vector; or the model as --donor with its --reference to rv transfer.",
    "donor": "Give it as --vector to rv apply.",
    "reference": "Give as --reference the model that the donor began as, or the vector alone as --vector to rv apply.",
    "target": "Give a model as --target, and the vector as --vector to rv apply; to add vectors up, write "
    "a recipe for rv run, with `model:` for each of them and no `target:`.",
}


def role_problems(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> Iterator[Problem]:
    """Models that are given as vectors, and vectors that are given as models."""
    for role, checkpoint in _used(recipe, opened):
        made_by = _operation(checkpoint)
        if role in _INSTEAD and made_by and (made_by == "extract") != (role == "vector"):
            is_what = "a vector" if made_by == "extract" else "a model"
            what = f"is given as the {role}, but its rv_manifest.json says that it is {is_what}, made by {made_by}"
            yield Problem(checkpoint.uri, what, _INSTEAD[role])


def role_warnings(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> Iterator[str]:
    """Vectors that nothing says to be some."""
    for role, checkpoint in _used(recipe, opened):
        if role == "vector" and not _operation(checkpoint):
            yield f"{checkpoint.name}: nothing says that it is a vector: if it is a model, all of its weights are added"


def _used(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> Iterator[tuple[Role, Checkpoint]]:
    inputs = recipe.inputs
    return ((role, opened[name]) for role, name in dict.fromkeys(recipe.roles) if name in inputs)


def _operation(checkpoint: Checkpoint) -> str:
    """What made it, where that tells whether it is a vector; else empty."""
    operation = (checkpoint.manifest or {}).get("operation")
    return str(operation) if operation in OPERATIONS and operation != "linear" else ""
