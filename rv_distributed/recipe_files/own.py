"""Our own recipe files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Final

from rv_distributed.checkpoint.key_mapping import KeyRule
from rv_distributed.checkpoint.uris import is_remote, parent
from rv_distributed.errors import InputError, Problem, UsageError
from rv_distributed.plan import PlanOptions
from rv_distributed.plan.options import SHARED_OPTIONS
from rv_distributed.recipe import Alpha, ByTensor, Choice, Operation, Recipe, Vector, show_alpha
from rv_distributed.recipe_files.document import Document
from rv_distributed.recipe_files.fields import AlphaFields, ChoiceFields, RecipeFields, SweepFields, VectorFields
from rv_distributed.recipe_files.loaded import LoadedRecipe, resolve
from rv_distributed.recipe_files.validation import validate

_SEE: Final = "rv recipe init shows the fields, and rv recipe schema describes them."


def from_own(document: Document) -> LoadedRecipe:
    """The recipe in a file of ours. Raises InputError with every problem."""
    fields = validate(document, RecipeFields, _SEE)
    problems = _misfits(document, fields)
    if problems:
        raise InputError(problems)
    folder = parent(document.path if is_remote(document.path) else os.path.abspath(document.path))
    base = fields.base and resolve(fields.base, folder)
    target = fields.target and resolve(fields.target, folder)
    try:
        rows, labels = _outputs(fields)
        recipe = Recipe(
            fields.operation or _operation(fields),
            target,
            tuple(_vector(vector, folder) for vector in fields.vectors),
            rows,
            normalize=fields.normalize,
            scale=_alpha(fields.scale),
            base=base,
        )
        options = PlanOptions(
            **{name: getattr(fields, name) for name in SHARED_OPTIONS},
            max_shard_bytes=fields.max_shard_size,
            key_mapping=tuple(KeyRule(*rule) for rule in fields.key_mapping.items()),
        )
    except UsageError as error:
        raise InputError([document.problem((), str(error), _SEE)]) from None
    return LoadedRecipe(recipe, options, labels)


def _operation(fields: RecipeFields) -> Operation:
    if fields.target is None:
        return "linear" if fields.vectors[0].model is not None else "extract"
    return "transfer" if len(fields.vectors) == 1 and fields.vectors[0].donor is not None else "apply"


def _misfits(document: Document, fields: RecipeFields) -> list[Problem]:
    """What is wrong with fields that are right by themselves."""
    problems = []
    operation = fields.operation or _operation(fields)
    for number, vector in enumerate(fields.vectors):
        place = ("vectors", number)
        kind = "model" if vector.model else "donor" if vector.donor else "vector"
        if operation == "linear" and kind != "model":
            what = f"is a {kind}, but this is a sum of models, since there is no target"
            problems.append(document.problem(place, what, "Give a target, or a model here."))
        elif operation != "linear" and kind == "model":
            what = "is a model, and the recipe has a target or a vector"
            problems.append(document.problem(place, what, "Give a vector, or a donor and a reference."))
        elif operation in ("extract", "transfer") and (kind != "donor" or number > 0):
            what = f"{operation} takes one donor and one reference"
            problems.append(document.problem(place, what, "Leave the operation out, or the other vectors."))
        if operation == "extract" and vector.alpha is not None:
            problems.append(document.problem((*place, "alpha"), "goes with a target only", "Leave it out."))
    if fields.base is not None and operation != "linear":
        problems.append(document.problem(("base",), "goes with a sum of models only", "Leave it out."))
    if fields.sweep is not None:
        problems += _sweep_misfits(document, fields, fields.sweep)
    return problems


def _sweep_misfits(document: Document, fields: RecipeFields, sweep: SweepFields) -> list[Problem]:
    problems = []
    if fields.target is None:
        problems.append(document.problem(("sweep",), "goes with a target only", "Leave it out."))
    if sweep.alpha is not None and all(vector.alpha is not None for vector in fields.vectors):
        what = "changes nothing, since every vector states its own alpha"
        problems.append(document.problem(("sweep", "alpha"), what, "Leave one of them out."))
    if twice := [alpha for alpha, count in Counter(sweep.alpha).items() if count > 1]:
        what = f"holds {show_alpha(twice[0])} more than once"
        problems.append(document.problem(("sweep", "alpha"), what, "Leave it there once."))
    for name in sweep.include or ():
        if not name or "/" in name or name.startswith("."):
            what = f"{name!r} cannot be a part of a folder's name"
            problems.append(document.problem(("sweep", "include", name), what, "Give it another name."))
    return problems


def _outputs(fields: RecipeFields) -> tuple[tuple[tuple[Alpha, ...], ...], tuple[Mapping[str, str], ...]]:
    """The alphas of every output, and what to call it."""
    sweep = fields.sweep or SweepFields()
    rows, labels = [], []
    includes: Sequence[tuple[str, str | None]] = list(sweep.include.items()) if sweep.include else [("", None)]
    for alpha, (name, include) in product(sweep.alpha or (1.0,), includes):
        own = [alpha if vector.alpha is None else _alpha(vector.alpha) for vector in fields.vectors]
        rows.append(tuple(_limited(one, include) for one in own))
        label = {"alpha": show_alpha(alpha)} if sweep.alpha else {}
        labels.append(label | ({"include": name} if include is not None else {}))
    return tuple(rows), tuple(labels)


def _limited(alpha: Alpha, include: str | None) -> Alpha:
    """``alpha`` where ``include`` finds something in the tensor's name, and else 0."""
    if include is None:
        return alpha
    choices = alpha.choices if isinstance(alpha, ByTensor) else (Choice((alpha,)),)
    return ByTensor(tuple(choice._replace(match=(include, *choice.match)) for choice in choices))


def _alpha(fields: AlphaFields) -> Alpha:
    """An alpha from its fields."""
    if not isinstance(fields, list):
        return fields
    if values := tuple(entry for entry in fields if isinstance(entry, float)):
        return ByTensor((Choice(values),))
    choices = (entry for entry in fields if isinstance(entry, ChoiceFields))
    return ByTensor(tuple(Choice(_values(entry.alpha), entry.patterns) for entry in choices))


def _values(alpha: float | list[float]) -> tuple[float, ...]:
    return tuple(alpha) if isinstance(alpha, list) else (alpha,)


def _vector(fields: VectorFields, folder: str) -> Vector:
    plus = fields.vector or fields.donor or fields.model or ""
    return Vector(resolve(plus, folder), fields.reference and resolve(fields.reference, folder))
