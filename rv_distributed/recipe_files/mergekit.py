"""mergekit's files, as far as they say what rv computes: ``merge_method`` linear and task_arithmetic.

How a parameter's value is found is that of mergekit 0.1.5: a model's own setting comes before the one for all, filters
are parts of tensors' names, and a list is interpolated over the layers; what lies in no layer gets its first number.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from rv_distributed.errors import InputError, Problem
from rv_distributed.plan import PlanOptions
from rv_distributed.recipe import Alpha, ByTensor, Choice, Recipe, Vector
from rv_distributed.recipe_files.document import Document
from rv_distributed.recipe_files.fields import Fields, Number, NumberOrGradient, kind_of_alpha
from rv_distributed.recipe_files.loaded import LoadedRecipe, resolve
from rv_distributed.recipe_files.validation import validate
from rv_distributed.storage import is_hub_name
from rv_distributed.storage.uris import HubUri

_REMEDY: Final = "Of mergekit's files rv runs linear and task_arithmetic, see its README; use mergekit for the rest."


def _dtype(value: object) -> object:
    return value.removeprefix("torch.") if isinstance(value, str) else value


class _Conditional(Fields):
    filter: str | None = None
    value: NumberOrGradient


def _kind_of_setting(value: object) -> str:
    return "conditional" if isinstance(value, dict) else kind_of_alpha(value)


Setting = Annotated[
    Annotated[Number, Tag("one")]
    | Annotated[list[Number], Field(min_length=1), Tag("several")]
    | Annotated[list[_Conditional], Tag("choices")]
    | Annotated[_Conditional, Tag("conditional")],
    Discriminator(_kind_of_setting),
]
DType = Annotated[Literal["float32", "bfloat16", "float16"], BeforeValidator(_dtype)]


class _ModelParameters(Fields):
    weight: Setting | None = None


class _Model(Fields):
    model: str
    parameters: _ModelParameters = _ModelParameters()


class _Parameters(Fields):
    weight: Setting | None = None
    normalize: bool | None = None
    lambda_: Annotated[Setting | None, Field(alias="lambda")] = None
    int8_mask: bool = False
    """Of masks, which these methods do not have."""


class _File(Fields):
    merge_method: Literal["linear", "task_arithmetic"]
    models: Annotated[list[_Model], Field(min_length=1)]
    base_model: str | None = None
    parameters: _Parameters = _Parameters()
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer_source: Literal["base"] | None = None


def from_mergekit(document: Document) -> LoadedRecipe:
    """The recipe in a mergekit file. Raises InputError with every problem."""
    file = validate(document, _File, _REMEDY)
    problems = _misfits(document, file)
    if problems:
        raise InputError(problems)
    recipe = _linear(file) if file.merge_method == "linear" else _task_arithmetic(file)
    return LoadedRecipe(recipe, PlanOptions(dtype=file.out_dtype or file.dtype or "auto"), ({},))


def _inputs(file: _File) -> list[tuple[tuple[str | int, ...], _Model]]:
    """The models that get weights, each with its place in the file. mergekit adds a base that is not listed to a linear
    combination, with the weight for all."""
    found: list[tuple[tuple[str | int, ...], _Model]] = [
        (("models", number), model)
        for number, model in enumerate(file.models)
        if file.merge_method == "linear" or model.model != file.base_model
    ]
    listed = {model.model for model in file.models}
    if file.merge_method == "linear" and file.base_model is not None and file.base_model not in listed:
        found.append((("base_model",), _Model(model=file.base_model)))
    return found


def _misfits(document: Document, file: _File) -> list[Problem]:
    problems = []
    if file.merge_method == "task_arithmetic" and file.base_model is None:
        problems.append(document.problem(("base_model",), "is missing", "Name the model that the others add to."))
    if file.merge_method == "task_arithmetic" and not _inputs(file):
        what = "are none but the base_model, so there is nothing to add"
        problems.append(document.problem(("models",), what, "Name another model."))
    if file.merge_method == "linear" and file.parameters.lambda_ is not None:
        problems.append(document.problem(("parameters", "lambda"), "goes with task_arithmetic only", _REMEDY))
    if file.tokenizer_source is not None and file.base_model is None:
        problems.append(document.problem(("tokenizer_source",), "needs a base_model", "Name one."))
    for place, model in _inputs(file):
        last = [*_choices(model.parameters.weight), *_choices(file.parameters.weight)][-1:]
        if not last or last[0].match:
            what = f"has no weight for {'tensors that no filter fits' if last else 'any tensor'}"
            remedy = "Give it a weight, or a last one without a filter."
            problems.append(document.problem((*place, "parameters", "weight"), what, remedy))
    return problems


def _linear(file: _File) -> Recipe:
    inputs = [model for _, model in _inputs(file)]
    return Recipe(
        "linear",
        None,
        tuple(Vector(_name(model.model)) for model in inputs),
        (tuple(_weight(model, file) for model in inputs),),
        normalize=file.parameters.normalize is not False,
        base=_name(file.base_model) if file.base_model is not None else None,
    )


def _task_arithmetic(file: _File) -> Recipe:
    inputs = [model for _, model in _inputs(file)]
    base = _name(file.base_model or "")
    return Recipe(
        "task_arithmetic",
        base,
        tuple(Vector(_name(model.model), base) for model in inputs),
        (tuple(_weight(model, file) for model in inputs),),
        normalize=file.parameters.normalize is True,
        scale=_alpha((*_choices(file.parameters.lambda_), Choice((1.0,)))),
    )


def _weight(model: _Model, file: _File) -> Alpha:
    return _alpha((*_choices(model.parameters.weight), *_choices(file.parameters.weight)))


def _choices(setting: Setting | None) -> tuple[Choice, ...]:
    """A setting's conditions, of which the first that fits decides."""
    if setting is None:
        return ()
    if isinstance(setting, float):
        return (Choice((setting,)),)
    if isinstance(setting, _Conditional):
        return (_choice(setting),)
    if values := tuple(entry for entry in setting if isinstance(entry, float)):
        return (Choice(values),)
    return tuple(_choice(entry) for entry in setting if isinstance(entry, _Conditional))


def _choice(conditional: _Conditional) -> Choice:
    value, of = conditional.value, conditional.filter
    values = tuple(value) if isinstance(value, list) else (value,)
    return Choice(values, () if of in (None, "*") else (re.escape(of),))


def _alpha(choices: tuple[Choice, ...]) -> Alpha:
    """Choices after the first without a condition are never asked."""
    first = next((number for number, choice in enumerate(choices) if not choice.match), len(choices))
    kept = choices[: first + 1]
    return kept[0].values[0] if len(kept) == 1 and len(kept[0].values) == 1 else ByTensor(kept)


def _name(model: str) -> str:
    """As mergekit has it: a path from the current folder on or, where there is none, a model on the Hub."""
    parts = [model] if os.path.lexists(model) else model.split("+", 1)
    return "+".join(_part(part) for part in parts)


def _part(name: str) -> str:
    if os.path.lexists(name) or not is_hub_name(name):
        return resolve(name, os.getcwd())
    repo, _, revision = name.partition("@")
    return str(HubUri(repo, revision or None, ""))
