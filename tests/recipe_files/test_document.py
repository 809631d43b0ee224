"""YAML as hostile input, the lines of values, and environment variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from rv_distributed.errors import InputError
from rv_distributed.recipe_files.document import Document, read_document

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


def read(tmp_path: Path, text: str | bytes) -> Document:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_document(str(path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB, "more than the 20000 values"),
        ("a: &a [*a]", "alias of what it lies in"),
        ("a: !!python/object/apply:os.system [true]", "tag:yaml.org,2002:python"),
        ("a: !!python/name:os.system x", "tag:yaml.org,2002:python/name"),
        ("a: !!binary aGk=", "tag:yaml.org,2002:binary"),
        ("x: &x {b: 1}\na:\n  <<: *x\n", "has a key that is no text"),
        ("a: 1\na: 2", "a: stands there twice"),
        ("? [1]\n: 2", "has a key that is no text"),
        ("- 1", "is not a map"),
        ("", "is not a map"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("a: [1", "recipe.yaml:1: is not YAML"),
        ("a: {b:\n  - }: c", "is not YAML"),
        (b"a: \xff", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("a: " + "9" * 5000, "is no int"),
        ("# " + "x" * 300_000, "has more than the 262144 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_hostile_files_are_refused(tmp_path: Path, text: str | bytes, told: str) -> None:
    with pytest.raises(InputError) as raised:
        read(tmp_path, text)
    assert told in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_document(str(tmp_path / "recipe.yaml"))


def test_values_keep_their_types_and_lines(tmp_path: Path) -> None:
    found = read(tmp_path, "a: 1\nb:\n  - 0.5\n  - {c: text, d: null}\ne: 2026-01-01\nf: 'yes'\ng: yes\n")
    assert found.value == {
        "a": 1,
        "b": [0.5, {"c": "text", "d": None}],
        "e": "2026-01-01",
        "f": "yes",
        "g": True,
    }
    assert [found.lines[place] for place in [("a",), ("b", 0), ("b", 1, "c"), ("g",)]] == [1, 3, 4, 7]
    assert found.problem(("b", 1, "missing", 3), "is wrong", "Mend it.").where.endswith("recipe.yaml:4")


def test_an_alias_means_what_it_names(tmp_path: Path) -> None:
    assert read(tmp_path, "a: &a [1, 2]\nb: *a\n").value == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${RV_T_ONE}", "models"),
        ("${RV_T_ONE}/x", "models/x"),
        ("${RV_T_NUMBER}", 0.7),
        ("'${RV_T_NUMBER}'", "0.7"),
        ("${RV_T_NONE:-0.5}", 0.5),
        ("${RV_T_EMPTY:-text}", "text"),
        ("${RV_T_EMPTY:-}", None),
        ("${RV_T_ONE:-text}", "models"),
        ("$${RV_T_ONE}", "${RV_T_ONE}"),
        (r"'\.weight$'", r"\.weight$"),
        ("$RV_T_ONE", "$RV_T_ONE"),
        ("'${'", "${"),
    ],
)
def test_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: object) -> None:
    for name, content in {"RV_T_ONE": "models", "RV_T_NUMBER": "0.7", "RV_T_EMPTY": ""}.items():
        monkeypatch.setenv(name, content)
    assert read(tmp_path, f"a: {text}").value == {"a": value}


def test_a_variable_that_is_not_set_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        read(tmp_path, "a: 1\nb: ${RV_T_NOT_THERE}\nc: ${RV_T_NOR_THIS}\n")
    assert [problem.where[-2:] for problem in raised.value.problems] == [":2", ":3"]
    assert "RV_T_NOT_THERE" in str(raised.value)


def test_what_a_variable_holds_is_text_and_never_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RV_T_ONE", "[1, 2]\nb: 3 ${HOME}")
    assert read(tmp_path, "a: ${RV_T_ONE}").value == {"a": "[1, 2]\nb: 3 ${HOME}"}
