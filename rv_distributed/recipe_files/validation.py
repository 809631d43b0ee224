"""pydantic's errors as problems with the line and the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from rv_distributed.errors import InputError, Problem, without_prefix
from rv_distributed.recipe_files.document import Document
from rv_distributed.recipe_files.fields import Fields

_FieldsT = TypeVar("_FieldsT", bound=Fields)


def validate(document: Document, fields: type[_FieldsT], remedy: str) -> _FieldsT:
    """The document's fields. Raises InputError with every problem."""
    try:
        return fields.model_validate(document.value)
    except ValidationError as error:
        problems = [_problem(document, entry, remedy) for entry in error.errors(include_url=False)]
        raise InputError(problems) from None


def _problem(document: Document, error: Any, remedy: str) -> Problem:
    kinds = {"extra_forbidden": "is not supported", "missing": "is missing"}
    what = kinds.get(error["type"]) or without_prefix(str(error["msg"]))
    if what.startswith("Input should"):
        what = f"is {error['input']!r:.60}, but{what.removeprefix('Input')}".replace("but should", "but it should")
    return document.problem(_in_document(document, error["loc"]), what, remedy)


def _in_document(document: Document, loc: Sequence[str | int]) -> tuple[str | int, ...]:
    """pydantic's way to a value, without the forms that it was tried as; its last step may be to a missing field."""
    place: tuple[str | int, ...] = ()
    for number, step in enumerate(loc):
        if (*place, step) in document.lines or (number == len(loc) - 1 and step not in ("one", "several", "choices")):
            place = (*place, step)
    return place
