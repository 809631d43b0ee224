"""The model card: the Hub reads its metadata back, and nothing in it is interpreted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from rv_distributed.checkpoint.card import TAGS, build_card, license_fields, model_name
from rv_distributed.checkpoint.manifest import InputEntry, Manifest, Timings, Totals


def manifest(*roles: str, operation: str = "transfer") -> Manifest:
    inputs = tuple(InputEntry(role, f"/models/{role}", "blake3:" + "0a" * 32, None) for role in roles)
    totals = Totals(12, 9, 2, 1, 100, 200, 1.0, 2.0, 0.5, 0.0, 0.7, 0.7, 0.1, 95, 90, 5, 2, 0, 0, 0, 0)
    return Manifest(
        operation=operation,
        formula="target + 0.7·(donor − reference)",
        inputs=inputs,
        alphas=(0.7,),
        options={"rounding": "nearest", "seed": "0", "compute_dtype": "float32"},
        versions={},
        created="2025-09-01T12:00:00+00:00",
        identity="0" * 64,
        shards=(),
        files=(),
        rules=(),
        left_out=(),
        files_left_out=(),
        totals=totals,
        timings=Timings(1.0, 0.5, 1.0, 0.5, 2, 3, 4, 0),
    )


NAMES = {"/models/target": "org/target", "/models/donor": "org/donor", "/models/reference": "org/target"}


def metadata_of(card: str, folder: Path) -> dict[str, Any]:
    path = folder / "README.md"
    path.write_bytes(card.encode())
    metadata = metadata_load(path)
    assert metadata is not None
    data: Any = ModelCard(card).data
    assert data.to_dict() == metadata
    return metadata


def cells(card: str) -> list[list[str]]:
    """The cells of the table, read as GitHub reads them: a backslash keeps a pipe from ending a cell."""
    rows = [re.findall(r"\|((?:\\.|[^\\|])*)(?=\|)", line) for line in card.split("\n") if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows]


def test_the_hub_reads_the_metadata_back(tmp_path: Path) -> None:
    card = build_card(manifest("target", "donor", "reference"), NAMES, {"license": "apache-2.0"})
    assert metadata_of(card, tmp_path) == {
        "base_model": ["org/target", "org/donor"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "tags": list(TAGS),
    }


OTHER = {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"}


def test_a_licence_of_its_own_keeps_its_name_and_its_link(tmp_path: Path) -> None:
    made = metadata_of(build_card(manifest("target"), NAMES, license_fields({**OTHER, "tags": ["x"]})), tmp_path)
    assert {name: made[name] for name in OTHER} == OTHER


def test_what_is_no_text_is_no_licence() -> None:
    assert license_fields({"license": ["mit"], "license_name": None, "license_link": {"a": 1}}) == {}


def test_a_token_in_the_licence_link_stays_behind(tmp_path: Path) -> None:
    link = "https://user:secret@example.org/LICENSE?token=secret&v=2"
    card = build_card(manifest("target"), NAMES, license_fields({"license_link": link}))
    assert metadata_of(card, tmp_path)["license_link"] == "https://***@example.org/LICENSE?token=***&v=2"
    assert "secret" not in card


def test_an_unknown_licence_is_left_out_of_the_metadata(tmp_path: Path) -> None:
    assert "license" not in metadata_of(build_card(manifest("target"), NAMES, {}), tmp_path)


def test_the_card_says_what_was_computed_from_what() -> None:
    card = build_card(manifest("target", "donor"), NAMES, {})
    assert "# A model with a reasoning vector added\n" in card
    assert "\n    target + 0.7·(donor − reference)\n" in card
    assert "9 of 12 tensors were computed in float32 and rounded once, to nearest; 1 were copied and 2 cast." in card
    assert cells(card) == [
        ["role", "model", "revision", "fingerprint"],
        ["---"] * 4,
        ["target", "org/target", "", "`blake3:0a0a0a0a0a0a0a0a…`"],
        ["donor", "org/donor", "", "`blake3:0a0a0a0a0a0a0a0a…`"],
    ]
    assert card.endswith("\n")


def test_a_vectors_card_calls_it_a_vector() -> None:
    assert "# A reasoning vector\n" in build_card(manifest("donor", operation="extract"), NAMES, {})


def test_a_known_revision_stands_in_its_row() -> None:
    made = manifest("target")
    (entry,) = made.inputs
    known = InputEntry(entry.role, entry.uri, entry.fingerprint, "ab" * 20)
    object.__setattr__(made, "inputs", (known,))
    assert cells(build_card(made, NAMES, {}))[2][2] == "ab" * 20


HOSTILE = {
    "a cell's border": "a|b",
    "an escaped border": "a\\|b",
    "a backslash at the end": "a\\",
    "HTML": "<script>alert(1)</script>",
    "an entity": "&lt;b&gt;",
    "an image": "![x](https://example.org/x.png)",
    "a link": "[x](javascript:alert)",
    "code": "`rm -rf`",
    "emphasis": "**a** __b__",
    "a heading": "# a",
    "a template": "{{ x }}",
    "the end of the metadata": "a\n---\nb",
    "YAML": "a: b # c",
    "a YAML tag": "!!python/object/apply:os.system ['true']",
    "struck-through text": "~~a~~",
    "other letters": "模型/é",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_licence_is_read_back_as_the_text_that_it_was(text: str, tmp_path: Path) -> None:
    card = build_card(manifest("target"), NAMES, dict.fromkeys(OTHER, text))
    metadata = metadata_of(card, tmp_path)
    assert [metadata[name] for name in OTHER] == [text] * 3
    assert metadata["base_model"] == ["org/target"]


def test_control_characters_in_a_name_are_escaped(tmp_path: Path) -> None:
    name = "a\x1b[31m\u202eb"
    card = build_card(manifest("target"), {"/models/target": name}, {})
    assert metadata_of(card, tmp_path)["base_model"] == [r"a\x1b[31m\u202eb"]
    assert "\x1b" not in card
    assert "\u202e" not in card


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_is_shown_and_not_interpreted(name: str, tmp_path: Path) -> None:
    card = build_card(manifest("target"), {"/models/target": name}, {"license": "mit"})
    metadata = metadata_of(card, tmp_path)
    assert (metadata["base_model"], metadata["license"]) == ([name.replace("\n", " ")], "mit")
    table = cells(card)
    assert [len(row) for row in table] == [4, 4, 4]
    shown = table[2][1]
    assert re.sub(r"\\(.)", r"\1", shown) == name.replace("\n", " ")
    assert re.search(r"(?<!\\)(?:\\\\)*[`*_{}\[\]<>|#!&~]", shown) is None


LINE_ENDS = ["\r", "\r\n", "\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("end", LINE_ENDS, ids=ascii)
def test_a_name_with_an_end_of_line_stays_in_its_cell(end: str, tmp_path: Path) -> None:
    name = f"a{end}| b | c | d |{end}# e"
    card = build_card(manifest("target"), {"/models/target": name}, {})
    assert cells(card)[2][1] == r"a \| b \| c \| d \| \# e"
    table = card[card.index("| role |") :]
    assert len(table.splitlines()) == len(table.split("\n")) - 1
    # YAML has its own mind about some of them; they all stay white space.
    (base_model,) = metadata_of(card, tmp_path)["base_model"]
    assert base_model.split() == name.split()


COMMIT = "0123456789" * 4
MODEL_NAMES: dict[str, tuple[str, str]] = {
    "a cache folder": (f"/c/models--org--name/snapshots/{COMMIT}", "org/name"),
    "a name with dashes": (f"/c/models--org--na--me/snapshots/{COMMIT}", "org/na--me"),
    "a cache folder of a model without an owner": (f"/c/models--gpt2/snapshots/{COMMIT}", "gpt2"),
    "only a folder": ("/models/my model/", "my model"),
}


@pytest.mark.parametrize(("uri", "name"), MODEL_NAMES.values(), ids=MODEL_NAMES)
def test_a_model_is_called_what_its_path_says(uri: str, name: str) -> None:
    assert model_name(uri) == name
