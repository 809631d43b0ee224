"""Files of ``--key-mapping``: regular expressions and what takes their place in tensors' names.

Either lines of the form ``REGEX -> REPLACEMENT``, with empty lines and comments from ``#`` on at a line's start, or a
JSON or YAML object of them, by the file's suffix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from rv_distributed.errors import InputError, Problem


class KeyRule(NamedTuple):
    """One rule: what `re.sub` gets."""

    pattern: str
    replacement: str


_LINE = re.compile(r"(?P<pattern>\S.*?)\s+->(?:\s+(?P<replacement>.*?))?\s*")
_REMEDY = "Write one rule a line, REGEX -> REPLACEMENT, or a JSON or YAML object of them."


def parse_key_mapping(path: str, raw: bytes) -> tuple[KeyRule, ...]:
    """The rules of a file, in their order. Raises InputError with every line that is none."""
    rules: dict[str, KeyRule] = {}
    problems: list[Problem] = []
    try:
        text = raw.decode()
        for line, entry in _entries(path, text):
            what = entry if isinstance(entry, str) else flaw_of(entry)
            if isinstance(entry, KeyRule) and entry.pattern in rules:
                what = f"{entry.pattern!r} stands there twice"
            if isinstance(entry, KeyRule) and not what:
                rules[entry.pattern] = entry
            else:
                problems.append(Problem(f"{path}:{line}", what, _REMEDY))
    except UnicodeDecodeError as error:
        problems.append(Problem(path, f"is not UTF-8: {error.reason} at byte {error.start}", _REMEDY))
    if not rules and not problems:
        problems.append(Problem(path, "holds no rule", _REMEDY))
    if problems:
        raise InputError(problems)
    return tuple(rules.values())


def flaw_of(rule: KeyRule) -> str:
    """What keeps a rule from being applied; empty when nothing does."""
    try:
        re.sub(rule.pattern, rule.replacement, "")
    except (re.error, IndexError) as error:
        return f"{rule.pattern!r} -> {rule.replacement!r} cannot be applied: {error}"
    return ""


def _entries(path: str, text: str) -> Iterator[tuple[int, KeyRule | str]]:
    """The line of every rule, with the rule or what is wrong there."""
    if path.lower().endswith((".json", ".yaml", ".yml")):
        yield from _from_object(text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if found is None:
            yield number, f"{line.strip()!r:.200} is no rule"
        else:
            yield number, KeyRule(found["pattern"], found["replacement"] or "")


def _from_object(text: str) -> Iterator[tuple[int, KeyRule | str]]:
    """YAML's parser reads JSON too, and knows the lines of what it reads."""
    import yaml

    try:
        document = yaml.compose(text.replace("\t", " "), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        yield (mark.line + 1 if mark else 1), f"cannot be read: {error.problem}"
        return
    except (yaml.YAMLError, RecursionError) as error:
        yield 1, f"cannot be read: {error}"
        return
    if document is None:
        return
    if not isinstance(document, yaml.MappingNode):
        yield document.start_mark.line + 1, "is no object of regular expressions and replacements"
        return
    for key, value in document.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode):
            yield line, KeyRule(key.value, value.value)
        else:
            yield line, "a regular expression and its replacement are texts"
