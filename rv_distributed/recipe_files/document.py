"""A YAML file as hostile input: bounded, without objects, and with the line of every value.

``${NAME}`` is the environment variable of that name and ``${NAME:-text}`` has a default; ``$${`` is ``${`` itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from rv_distributed.checkpoint.uris import is_remote, last_part, parent
from rv_distributed.errors import InputError, Problem
from rv_distributed.storage import open_folder

Place = tuple[str | int, ...]
"""The way to a value: keys of maps and numbers in lists."""

_MAX_BYTES: Final = 256 * 1024
#: With what aliases stand for.
_MAX_VALUES: Final = 20_000
_TAGS: Final = frozenset(
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "seq", "map")
)
_VARIABLE: Final = re.compile(r"\$\$\{|\$\{([^}:]*)(?::-([^}]*))?\}")


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file."""

    path: str
    value: dict[str, Any]
    lines: Mapping[Place, int]

    def problem(self, place: Sequence[str | int], what: str, remedy: str) -> Problem:
        """A problem of the value at a place, or of the nearest one around it that the file states."""
        known = tuple(place)
        while known and known not in self.lines:
            known = known[:-1]
        field = ".".join(str(step) for step in place)
        return Problem(f"{self.path}:{self.lines.get(known, 1)}", f"{field}: {what}" if field else what, remedy)


def read_document(path: str) -> Document:
    """Read a file that holds one map, by its path or URI. Raises InputError with every problem found."""
    remedy = "Give a recipe: rv recipe init writes one to begin with."
    try:
        if is_remote(path):
            raw = open_folder(parent(path)).read(last_part(path), 0, _MAX_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise InputError([Problem(path, f"cannot be read: {error.strerror or error}", remedy)]) from None
    if len(raw) > _MAX_BYTES:
        raise InputError([Problem(path, f"has more than the {_MAX_BYTES} bytes that a recipe may have", remedy)])
    try:
        node = yaml.compose(raw.decode("utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        what = f"is not YAML: {error.problem or error.context or error}"
        raise InputError([Problem(f"{path}:{line}", what, "Correct the line.")]) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        what = f"is not YAML: {' '.join(str(error).split())}"
        raise InputError([Problem(path, what, remedy)]) from None
    reader = _Reader(path)
    value = reader.read(node, ()) if node is not None else None
    if not isinstance(value, dict):
        reader.problems.append(Problem(path, "is not a map of fields to values", remedy))
        value = {}
    if reader.problems:
        raise InputError(reader.problems)
    return Document(path, value, reader.lines)


class _Reader:
    """Makes plain values of YAML's nodes. The values of aliases are counted as often as they are named."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._values = 0
        self._above: list[yaml.Node] = []
        self.problems: list[Problem] = []
        self.lines: dict[Place, int] = {}

    def read(self, node: yaml.Node, place: Place) -> Any:
        self.lines[place] = node.start_mark.line + 1
        self._values += 1
        if any(node is above for above in self._above):
            return self._refuse(node, place, "is an alias of what it lies in")
        if node.tag not in _TAGS:
            what = f"has the tag {node.tag}; a recipe holds texts, numbers, lists and maps"
            return self._refuse(node, place, what)
        if self._values > _MAX_VALUES:
            return self._refuse(node, place, f"is more than the {_MAX_VALUES} values that a recipe may have")
        self._above.append(node)
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, place)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*place, number)) for number, item in self._some(enumerate(node.value))]
            return self._map(node, place)
        finally:
            self._above.pop()

    def _some(self, items: Iterable[Any]) -> Iterable[Any]:
        for item in items:
            if self._values > _MAX_VALUES:
                return
            yield item

    def _map(self, node: yaml.Node, place: Place) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in self._some(node.value):
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _TAGS:
                self._refuse(key_node, place, "has a key that is no text")
                continue
            key = key_node.value
            if key in found:
                self._refuse(key_node, (*place, key), "stands there twice")
            found[key] = self.read(value_node, (*place, key))
        return found

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        text, tag = self._substituted(node, place), node.tag
        if text != node.value and node.style is None:
            tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False))
        if tag.endswith((":str", ":timestamp")):
            return text
        try:
            return yaml.SafeLoader("").construct_object(yaml.ScalarNode(tag, text))
        except (ValueError, yaml.YAMLError):
            return self._refuse(node, place, f"{text!r:.80} is no {tag.rpartition(':')[2]}")

    def _substituted(self, node: yaml.ScalarNode, place: Place) -> str:
        def value_of(found: re.Match[str]) -> str:
            if found[1] is None:
                return "${"
            value = os.environ.get(found[1])
            if not value and found[2] is not None:
                value = found[2]
            if value is None:
                remedy = f"Set it, or write a default: ${{{found[1]}:-text}}."
                self._refuse(node, place, f"the environment variable {found[1]!r:.80} is not set", remedy)
            return value or ""

        return _VARIABLE.sub(value_of, node.value) if "${" in node.value else str(node.value)

    def _refuse(self, node: yaml.Node, place: Place, what: str, remedy: str = "Correct the line.") -> None:
        field = ".".join(map(str, place))
        where = f"{self._path}:{node.start_mark.line + 1}"
        self.problems.append(Problem(where, f"{field}: {what}" if field else what, remedy))
