"""The manifest: its schema, its round trip, and what is not one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from rv_distributed.checkpoint.manifest import (
    MANIFEST_SCHEMA,
    SCHEMA_VERSION,
    FileEntry,
    FileLeftOut,
    InputEntry,
    LeftOut,
    Manifest,
    ManifestError,
    RuleEntry,
    ShardEntry,
    Timings,
    Totals,
    manifest_from,
)

MANIFEST = Manifest(
    operation="transfer",
    formula="target + 0.7·(donor − reference)",
    inputs=(
        InputEntry("target", "/models/t", "blake3:" + "0a" * 32, "c" * 40),
        InputEntry("donor", "/models/dönor", "blake3:" + "1b" * 32, None),
    ),
    alphas=(0.699999988079071,),
    options={"dtype": "auto", "include": ".*"},
    versions={"rv_distributed": "0.1.0", "torch": "2.6.0"},
    created="2025-09-01T12:00:00+00:00",
    identity="ef" * 32,
    shards=(ShardEntry("model.safetensors", 2**40, "ab" * 32),),
    files=(FileEntry("config.json", 0, "cd" * 32),),
    rules=(RuleEntry("names", "donor: 'model.' → '' (9 tensors)"),),
    left_out=(LeftOut("lm_head.weight", "is not in the target"),),
    files_left_out=(FileLeftOut("optimizer.pt", "training state"),),
    totals=Totals(
        tensors=3,
        combined=1,
        cast=1,
        copied=1,
        parameters=2**50,
        data_bytes=2**51,
        v_norm=0.1,
        t_norm=1e300,
        v_max=None,
        cosine=None,
        alpha=-0.5,
        realised_alpha=-0.47,
        relative_error=None,
        nonzero_elements=9,
        changed_elements=7,
        absorbed_elements=2,
        ulps_max=3,
        inexact_elements=0,
        overflowed_elements=0,
        nan_elements=0,
        infinite_elements=0,
    ),
    timings=Timings(
        run_s=12.5,
        read_s=3.5,
        compute_s=6.0,
        write_s=15.5,
        bytes_read=2**41,
        bytes_written=2**40,
        pieces=9,
        pieces_kept=2,
    ),
)


def document() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(MANIFEST.to_json())
    return parsed


def test_the_schema_is_a_schema() -> None:
    validator: Any = jsonschema.Draft202012Validator
    validator.check_schema(MANIFEST_SCHEMA)


def test_the_schema_accepts_a_manifest() -> None:
    jsonschema.validate(document(), MANIFEST_SCHEMA)


def test_the_schema_accepts_a_vectors_manifest_without_alphas_or_norms() -> None:
    extract = document() | {
        "operation": "extract",
        "alphas": [],
        "left_out": [],
        "files": [],
        "rules": [],
        "files_left_out": [],
    }
    extract["totals"] |= {"v_norm": None, "t_norm": 0}
    jsonschema.validate(extract, MANIFEST_SCHEMA)


SCHEMA_REFUSES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda d: d.update(schema_version=SCHEMA_VERSION + 1),
    "an unknown field": lambda d: d.update(extra=1),
    "an unknown operation": lambda d: d.update(operation="merge"),
    "an unknown role": lambda d: d["inputs"][0].update(role="parent"),
    "a fingerprint without its function": lambda d: d["inputs"][0].update(fingerprint="00" * 32),
    "a short digest": lambda d: d["shards"][0].update(digest="ab"),
    "a digest in capitals": lambda d: d["files"][0].update(digest="AB" * 32),
    "a negative size": lambda d: d["shards"][0].update(bytes=-1),
    "a size as text": lambda d: d["files"][0].update(bytes="1"),
    "an option that is no text": lambda d: d["options"].update(workers=3),
    "an alpha as text": lambda d: d["alphas"].append("0.7"),
    "a norm as text": lambda d: d["totals"].update(v_norm="1"),
    "an unknown total": lambda d: d["totals"].update(extra=1),
    "a time as text": lambda d: d["timings"].update(run_s="1"),
}


@pytest.mark.parametrize("edit", SCHEMA_REFUSES.values(), ids=SCHEMA_REFUSES)
def test_the_schema_refuses(edit: Callable[[dict[str, Any]], object]) -> None:
    bad = document()
    edit(bad)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, MANIFEST_SCHEMA)


@pytest.mark.parametrize("name", sorted(document()))
def test_no_field_may_be_missing(name: str) -> None:
    bad = document()
    del bad[name]
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(bad, MANIFEST_SCHEMA)
    with pytest.raises(ManifestError, match=name):
        manifest_from(bad)


@pytest.mark.parametrize(
    "place", ["inputs", "shards", "files", "rules", "left_out", "files_left_out", "totals", "timings"]
)
def test_an_entry_with_a_missing_or_an_unknown_field_is_refused(place: str) -> None:
    edits: list[Callable[[dict[str, Any]], object]] = [dict.popitem, lambda entry: entry.update(unknown=1)]
    for edit in edits:
        bad = document()
        edit(bad[place] if isinstance(bad[place], dict) else bad[place][0])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, MANIFEST_SCHEMA)
        with pytest.raises(ManifestError, match="is not a manifest"):
            manifest_from(bad)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_version_is_refused_by_its_number(version: object) -> None:
    with pytest.raises(ManifestError, match=r"has schema_version .*; this version reads 1") as caught:
        manifest_from(document() | {"schema_version": version})
    assert repr(version) in str(caught.value)


NUMBER = 3
NESTED: list[list[object]] = [[]]
OTHER_KINDS: list[tuple[str, object]] = [
    *(
        (place, NUMBER)
        for place in ("inputs", "shards", "files", "rules", "left_out", "files_left_out", "alphas", "totals", "timings")
    ),
    *(
        (place, None)
        for place in ("inputs", "shards", "files", "rules", "left_out", "files_left_out", "alphas", "totals", "timings")
    ),
    *(
        (place, NESTED)
        for place in ("inputs", "shards", "files", "rules", "left_out", "files_left_out", "totals", "timings")
    ),
]


@pytest.mark.parametrize(("place", "value"), OTHER_KINDS)
def test_a_field_of_another_kind_is_refused(place: str, value: object) -> None:
    bad = document() | {place: value}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, MANIFEST_SCHEMA)
    with pytest.raises(ManifestError, match="is not a manifest"):
        manifest_from(bad)


def test_a_manifest_comes_back_as_it_was_written() -> None:
    read = manifest_from(document())
    assert read == MANIFEST
    assert read.to_json() == MANIFEST.to_json()


def test_the_stored_document_is_readable_text_with_its_fields_in_order() -> None:
    raw = MANIFEST.to_json()
    assert raw.startswith(b'{\n  "operation": "transfer",\n')
    assert b'\n  "schema_version": 1,\n  "digest": "' in raw
    assert raw.endswith(b'"\n}\n')
    assert "target + 0.7·(donor − reference)".encode() in raw


def test_a_number_that_json_does_not_have_is_not_written() -> None:
    bad = copy.copy(MANIFEST)
    object.__setattr__(bad, "alphas", (float("nan"),))
    with pytest.raises(ValueError, match="not JSON compliant"):
        bad.to_json()


def test_adding_a_file_leaves_the_rest_and_the_original_alone() -> None:
    entry = FileEntry("README.md", 5, "ef" * 32)
    more = MANIFEST.with_file(entry)
    assert more.files == (*MANIFEST.files, entry)
    assert len(MANIFEST.files) == 1
    assert document() | {"files": json.loads(more.to_json())["files"]} == json.loads(more.to_json())
