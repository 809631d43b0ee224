"""`verify` on outputs whose manifest or table is damaged or forged: always a VerifyError that names the document."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from reference import weights, write_checkpoint

import rv_distributed as rv

MANIFEST, TABLE = "rv_manifest.json", "rv_tensors.parquet"
SHAPES = {"a": (70, 9), "b": (1000,), "empty": (0, 3), "c": (501, 3)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(73)
    roles = ("target", "donor", "reference")
    target, donor, reference = (
        write_checkpoint(root / role, {name: weights(rng, "BF16", shape) for name, shape in SHAPES.items()})
        for role in roles
    )
    made = str(root / "out")
    options, how = rv.PlanOptions(max_shard_bytes=4_000), rv.RunOptions(runtime="local", workers=1)
    rv.transfer(target, donor, reference, made, alpha=0.7, plan_options=options, run_options=how)
    return root / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A fresh copy of the output."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def files_found(out: Path) -> set[str]:
    with pytest.raises(rv.VerifyError) as caught:
        rv.verify(str(out))
    assert str(caught.value)
    return {finding.file for finding in caught.value.findings}


NOT_MANIFESTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"schema_version": 1, "operation": "tran',
    "not UTF-8": b"\xff\xfe{}",
    "nulls": bytes(100),
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "an empty object": b"{}",
    "only a version": b'{"schema_version": 1}',
    "too deep": b"[" * 200_000,
    "a huge number": b'{"schema_version": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", NOT_MANIFESTS.values(), ids=NOT_MANIFESTS)
def test_what_is_not_a_manifest_is_named(out: Path, content: bytes) -> None:
    (out / MANIFEST).write_bytes(content)
    assert files_found(out) == {MANIFEST}


#: Where in the document, and what stands there instead.
WRONG: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "version newer": (("schema_version",), 2),
    "version text": (("schema_version",), "1"),
    "version null": (("schema_version",), None),
    "version true": (("schema_version",), True),
    "operation unknown": (("operation",), "divide"),
    "formula a list": (("formula",), ["O"]),
    "created null": (("created",), None),
    "alphas text": (("alphas",), "0.7"),
    "alphas of text": (("alphas",), ["0.7"]),
    "options a list": (("options",), []),
    "inputs a number": (("inputs",), 7),
    "inputs of numbers": (("inputs",), [7]),
    "fingerprint null": (("inputs", 0, "fingerprint"), None),
    "shards null": (("shards",), None),
    "shards an object": (("shards",), {"name": "x"}),
    "shards of text": (("shards",), ["model.safetensors"]),
    "shard name a list": (("shards", 0, "name"), ["model.safetensors"]),
    "shard name an object": (("shards", 0, "name"), {}),
    "shard name null": (("shards", 0, "name"), None),
    "shard bytes text": (("shards", 0, "bytes"), "12"),
    "shard bytes negative": (("shards", 0, "bytes"), -1),
    "shard bytes a fraction": (("shards", 0, "bytes"), 1.5),
    "shard digest null": (("shards", 0, "digest"), None),
    "shard digest not hexadecimal": (("shards", 0, "digest"), "z" * 64),
    "shard digest short": (("shards", 0, "digest"), "ab"),
    "file name a list": (("files", 0, "name"), ["config.json"]),
    "file name a number": (("files", 0, "name"), 3),
    "file bytes null": (("files", 0, "bytes"), None),
    "file digest null": (("files", 0, "digest"), None),
    "file digest a list": (("files", 0, "digest"), []),
    "file digest not hexadecimal": (("files", 0, "digest"), "not a digest"),
    "file with another key": (("files", 0, "mode"), 7),
    "rules of texts": (("rules",), ["x"]),
    "left_out of lists": (("left_out",), [["x", "y"]]),
    "totals a list": (("totals",), []),
    "tensor count text": (("totals", "tensors"), "4"),
    "norm text": (("totals", "v_norm"), "big"),
    "timings null": (("timings",), None),
    "seconds text": (("timings", "run_s"), "1"),
}


@pytest.mark.parametrize(("place", "value"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_in_the_manifest_is_named(out: Path, place: tuple[str | int, ...], value: Any) -> None:
    document = json.loads((out / MANIFEST).read_bytes())
    at = document
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    (out / MANIFEST).write_text(json.dumps(document))
    assert MANIFEST in files_found(out)


@pytest.mark.parametrize("kind", ["shards", "files"])
@pytest.mark.parametrize("name", ["a\0b", "", ".", "../reference/model.safetensors", "/etc/passwd"])
def test_a_name_in_the_manifest_that_no_file_has_is_a_difference(out: Path, kind: str, name: str) -> None:
    document = json.loads((out / MANIFEST).read_bytes())
    old, document[kind][0]["name"] = document[kind][0]["name"], name
    (out / MANIFEST).write_text(json.dumps(document))
    found = files_found(out)
    assert MANIFEST in found or {old, name} <= found


@pytest.mark.parametrize("key", ["schema_version", "shards", "files", "totals", "created", "inputs"])
def test_a_missing_field_of_the_manifest_is_named(out: Path, key: str) -> None:
    document = json.loads((out / MANIFEST).read_bytes())
    del document[key]
    (out / MANIFEST).write_text(json.dumps(document))
    assert files_found(out) == {MANIFEST}


@pytest.mark.parametrize("kind", ["shards", "files"])
def test_a_file_whose_entry_was_taken_out_of_the_manifest_is_named(out: Path, kind: str) -> None:
    document = json.loads((out / MANIFEST).read_bytes())
    name = document[kind].pop(0)["name"]
    (out / MANIFEST).write_text(json.dumps(document))
    assert name in files_found(out)


def test_a_folder_without_a_manifest_is_no_output(out: Path, tmp_path: Path) -> None:
    (out / MANIFEST).unlink()
    (tmp_path / "empty").mkdir()
    for folder in (out, tmp_path / "empty", tmp_path / "absent"):
        with pytest.raises(rv.InputError) as caught:
            rv.verify(str(folder))
        (problem,) = caught.value.problems
        assert str(folder) in problem.where
        assert problem.remedy


def as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def with_column(name: str, value: Any, out: Path) -> bytes:
    rows = pq.read_table(out / TABLE).to_pylist()
    return as_parquet(pa.Table.from_pylist([{**row, name: value} for row in rows]))


TABLES: dict[str, Callable[[Path], bytes]] = {
    "no table": lambda _: b"rubbish",
    "broken footer": lambda _: b"PAR1" + bytes(500) + b"PAR1",
    "cut": lambda out: (out / TABLE).read_bytes()[:-40],
    "no rows": lambda out: as_parquet(pq.read_table(out / TABLE).slice(0, 0)),
    "a row less": lambda out: as_parquet(pq.read_table(out / TABLE).slice(1)),
    "rows twice": lambda out: as_parquet(pa.concat_tables([pq.read_table(out / TABLE)] * 2)),
    "no column parts": lambda out: as_parquet(pq.read_table(out / TABLE).drop_columns(["parts"])),
    "other columns": lambda _: as_parquet(pa.table({"x": [1]})),
    "digests null": lambda out: with_column("digest", None, out),
    "parts null": lambda out: with_column("parts", None, out),
    "shapes null": lambda out: with_column("shape", None, out),
    "digest not hexadecimal": lambda out: with_column("digest", "z" * 64, out),
    "starts negative": lambda out: with_column("start", -5, out),
    "starts text": lambda out: with_column("start", "5", out),
    "other shard": lambda out: with_column("shard", "../x.safetensors", out),
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_a_wrong_table_that_the_manifest_agrees_with_is_found(out: Path, make: Callable[[Path], bytes]) -> None:
    content = make(out)
    (out / TABLE).write_bytes(content)
    document = json.loads((out / MANIFEST).read_bytes())
    (entry,) = (item for item in document["files"] if item["name"] == TABLE)
    entry |= {"bytes": len(content), "digest": blake3(content).hexdigest()}
    (out / MANIFEST).write_text(json.dumps(document))
    assert files_found(out)
