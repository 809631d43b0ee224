"""From folders to a folder with the local runtime: the bytes, and everything that stands beside them."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors
import safetensors.torch
import torch
from blake3 import blake3
from reference import (
    USER_NAMES,
    Raw,
    accumulated,
    assert_same,
    combined,
    extracted,
    narrow,
    read_checkpoint,
    weights,
    widen,
    write_checkpoint,
)

import rv_distributed as rv
from rv_distributed.checkpoint.manifest import MANIFEST_SCHEMA
from rv_distributed.checkpoint.table import read_table

MIB = 1 << 20
PLAN = rv.PlanOptions(piece_bytes=MIB, max_shard_bytes=3_000_000)
LOCAL = rv.RunOptions(runtime="local", workers=2)
CONFIG = b'{"model_type": "x",\n\t"torch_dtype":  "bfloat16", "hidden_size": 601 }'
SIDECARS = {
    "config.json": CONFIG,
    "tokenizer.json": bytes(range(256)),
    "LICENSE": b"free\r\n",
    "code/modeling.py": b"raise SystemExit\n",
    "README.md": b"---\nlicense: mit\n---\n",
}
#: The three bytes in front put every tensor behind them at an odd place, in the inputs and in the outputs.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "mask": ("BOOL", (3,)),
    "embed": ("BF16", (1000, 601)),
    "norm": ("F32", (77,)),
    "empty": ("BF16", (0, 4)),
    "big": ("F32", (900_001,)),
    "ids": ("I64", (5,)),
    "scale": ("F32", ()),
    "half": ("F16", (333, 333)),
    "own": ("BF16", (1001,)),
    "tail": ("U8", (1,)),
}
FLOATS = ["embed", "norm", "empty", "big", "scale", "half"]
DONOR = {"half": "F32", "big": "F16", "embed": "BF16", "scale": "BF16", "extra": "F32", "norm": "BF16", "empty": "F16"}
REFERENCE = {"norm": "F32", "embed": "F16", "half": "BF16", "big": "F32", "scale": "F32", "empty": "F32"}


class Family(NamedTuple):
    """Target, donor and reference, and a folder for outputs."""

    target: str
    donor: str
    reference: str
    t: dict[str, Raw]
    a: dict[str, Raw]
    b: dict[str, Raw]

    def wanted(self, alpha: float, dtype: str | None = None) -> dict[str, Raw]:
        pairs = {name: [(self.a[name], self.b[name])] for name in FLOATS}
        return {
            name: combined(raw, pairs.get(name, []), [alpha] * len(pairs.get(name, [])), dtype)
            if raw.dtype in USER_NAMES
            else raw
            for name, raw in self.t.items()
        }


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    rng, root = np.random.default_rng(41), tmp_path_factory.mktemp("family")
    t = {name: weights(rng, dtype, shape) for name, (dtype, shape) in SHAPES.items()}
    a, b = (
        {name: weights(rng, dtype, SHAPES.get(name, ("", (9,)))[1]) for name, dtype in dtypes.items()}
        for dtypes in (DONOR, REFERENCE)
    )
    target = write_checkpoint(root / "target", t, shards=2, pad=1, sidecars=SIDECARS)
    donor = write_checkpoint(root / "donor", a, shards=3, pad=2, sidecars={"config.json": b"{}", "donor.txt": b"d"})
    return Family(target, donor, write_checkpoint(root / "reference", b, pad=7), t, a, b)


def transfer(family: Family, out: Path, **options: Any) -> rv.Manifest:
    given = {"plan_options": PLAN, "run_options": LOCAL, "alpha": 0.7, **options}
    return rv.transfer(family.target, family.donor, family.reference, str(out), **given)


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def shards_of(folder: str | Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(folder).items() if "safetensors" in name}


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.5, 0.7, 1e-3])
def test_transfer_has_the_reference_bits(family: Family, tmp_path: Path, alpha: float) -> None:
    manifest = transfer(family, tmp_path / "out", alpha=alpha)
    assert manifest.timings.pieces > 5
    assert len(manifest.shards) > 2
    assert_same(read_checkpoint(tmp_path / "out"), family.wanted(alpha))
    assert {(item.tensor, item.why) for item in manifest.left_out} == {("extra", f"only in {family.donor}")}


def test_alpha_zero_gives_the_target_s_bytes(family: Family, tmp_path: Path) -> None:
    transfer(family, tmp_path / "out", alpha=0.0)
    assert read_checkpoint(tmp_path / "out") == family.t


def test_extract_has_the_reference_bits_and_the_donor_s_order(family: Family, tmp_path: Path) -> None:
    for dtype, name in (("float32", "F32"), ("bfloat16", "BF16")):
        out = tmp_path / dtype
        options = replace(PLAN, dtype=dtype)
        manifest = rv.extract(family.donor, family.reference, str(out), plan_options=options, run_options=LOCAL)
        wanted = {key: extracted(family.a[key], family.b[key], name) for key in DONOR if key != "extra"}
        assert_same(read_checkpoint(out), wanted)
        exact = {key: extracted(family.a[key], family.b[key], "F32") for key in wanted}
        inexact = sum(np.sum(widen(wanted[key]) != widen(exact[key])) for key in wanted)
        assert manifest.totals.inexact_elements == inexact


def test_extract_then_apply_gives_transfer_s_bytes(family: Family, tmp_path: Path) -> None:
    vector, applied = str(tmp_path / "vector"), str(tmp_path / "applied")
    rv.extract(family.donor, family.reference, vector, plan_options=PLAN, run_options=LOCAL)
    rv.apply(family.target, {vector: 0.7}, applied, plan_options=PLAN, run_options=LOCAL)
    transfer(family, tmp_path / "out")
    assert shards_of(applied) == shards_of(tmp_path / "out")


def test_several_vectors_are_added_in_the_order_given(family: Family, tmp_path: Path) -> None:
    rng = np.random.default_rng(43)
    stored = [
        {name: weights(rng, "F32", SHAPES[name][1], scale) for name in names}
        for names, scale in ((FLOATS, 1.0), (["big", "own"], 1e3), (FLOATS[:2], 1e-2))
    ]
    uris = [write_checkpoint(tmp_path / f"v{n}", vector, pad=n) for n, vector in enumerate(stored)]
    alphas = [0.7, -1.0, 1e-3]
    pairs = list(zip(uris, alphas, strict=True))
    rv.apply(family.target, pairs, str(tmp_path / "out"), plan_options=PLAN, run_options=LOCAL)
    wanted = {
        name: combined(
            raw,
            [(vector[name], None) for vector in stored if name in vector],
            [alpha for vector, alpha in zip(stored, alphas, strict=True) if name in vector],
        )
        for name, raw in family.t.items()
    }
    assert_same(read_checkpoint(tmp_path / "out"), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_changes_the_weights_and_one_word_of_the_config(
    family: Family, tmp_path: Path, dtype: str
) -> None:
    options = rv.PlanOptions(piece_bytes=MIB, max_shard_bytes=3_000_000, dtype=dtype)
    transfer(family, tmp_path / "out", plan_options=options)
    name = next(name for name, user in USER_NAMES.items() if user == dtype)
    assert_same(read_checkpoint(tmp_path / "out"), family.wanted(0.7, name))
    found = files_of(tmp_path / "out")
    assert found["config.json"] == CONFIG.replace(b"bfloat16", dtype.encode())


def test_every_other_file_of_the_target_is_there_byte_for_byte(family: Family, tmp_path: Path) -> None:
    transfer(family, tmp_path / "out")
    found = files_of(tmp_path / "out")
    for name in SIDECARS.keys() - {"README.md"}:
        assert found[name] == SIDECARS[name], name
    own = {"README.md", "rv_manifest.json", "rv_recipe.yaml", "rv_tensors.parquet", "rv_pieces.parquet"}
    own.add("model.safetensors.index.json")
    assert {name for name in found if not name.endswith(".safetensors")} == SIDECARS.keys() | own
    assert b"license: mit" in found["README.md"]


def test_the_index_names_every_tensor_s_shard(family: Family, tmp_path: Path) -> None:
    transfer(family, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    assert list(index["weight_map"]) == list(family.t)
    assert index["metadata"]["total_size"] == sum(len(raw.data) for raw in family.t.values())
    wanted, loaded = family.wanted(0.7), 0
    for shard in sorted(set(index["weight_map"].values())):
        with safetensors.safe_open(tmp_path / "out" / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {name for name, where in index["weight_map"].items() if where == shard}
            for name in file.keys():  # noqa: SIM118 - the library's handle is not a mapping
                raw = file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes()
                assert raw == wanted[name].data, name
                loaded += 1
    assert loaded == len(wanted)


def test_a_single_shard_has_the_plain_name_and_no_index(family: Family, tmp_path: Path) -> None:
    transfer(family, tmp_path / "out", plan_options=rv.PlanOptions(piece_bytes=MIB))
    assert set(shards_of(tmp_path / "out")) == {"model.safetensors"}
    assert set(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")) == set(SHAPES)
    assert_same(read_checkpoint(tmp_path / "out"), family.wanted(0.7))


def test_the_manifest_fits_its_schema_and_every_digest_is_true(family: Family, tmp_path: Path) -> None:
    manifest = transfer(family, tmp_path / "out")
    found = files_of(tmp_path / "out")
    document = json.loads(found.pop("rv_manifest.json"))
    jsonschema.Draft202012Validator.check_schema(MANIFEST_SCHEMA)
    jsonschema.Draft202012Validator(MANIFEST_SCHEMA).validate(document)
    assert document == json.loads(json.dumps(asdict(manifest)))
    assert document["alphas"] == [float(np.float32(0.7))]
    assert [(item["role"], item["uri"]) for item in document["inputs"]] == [
        ("target", family.target),
        ("donor", family.donor),
        ("reference", family.reference),
    ]
    assert {item["name"] for item in document["files"] + document["shards"]} == found.keys()
    for item in document["files"]:
        assert (item["bytes"], item["digest"]) == (len(found[item["name"]]), blake3(found[item["name"]]).hexdigest())
    rows = pq.read_table(tmp_path / "out" / "rv_tensors.parquet").to_pylist()
    for item in document["shards"]:
        data = found[item["name"]]
        (length,) = struct.unpack("<Q", data[:8])
        parts = [part for row in rows if row["shard"] == item["name"] for part in row["parts"]]
        ranges = [(0, 8 + length), *((part["start"], part["stop"]) for part in parts)]
        assert item["bytes"] == len(data) == ranges[-1][1]
        assert item["digest"] == blake3(b"".join(blake3(data[low:high]).digest() for low, high in ranges)).hexdigest()
    totals = document["totals"]
    assert totals["data_bytes"] == sum(len(raw.data) for raw in family.t.values())
    assert (totals["tensors"], totals["combined"], totals["cast"], totals["copied"]) == (10, 6, 0, 4)
    assert totals["parameters"] == sum(math.prod(raw.shape) for raw in family.t.values())


def test_every_row_of_the_table_holds_what_its_tensor_shows(family: Family, tmp_path: Path) -> None:
    manifest = transfer(family, tmp_path / "out")
    found, wanted = files_of(tmp_path / "out"), family.wanted(0.7)
    rows = pq.read_table(tmp_path / "out" / "rv_tensors.parquet").to_pylist()
    assert [row["name"] for row in rows] == list(wanted)
    for row in rows:
        raw, target = wanted[row["name"]], family.t[row["name"]]
        assert (row["dtype"], tuple(row["shape"])) == raw[:2]
        data = found[row["shard"]][row["start"] : row["stop"]]
        assert data == raw.data
        ranges = [(part["start"], part["stop"]) for part in row["parts"]]
        assert b"".join(found[row["shard"]][low:high] for low, high in ranges) == data
        digests = [blake3(found[row["shard"]][low:high]) for low, high in ranges]
        assert [part["digest"] for part in row["parts"]] == [digest.hexdigest() for digest in digests]
        joined = digests[0] if len(digests) == 1 else blake3(b"".join(digest.digest() for digest in digests))
        assert row["digest"] == joined.hexdigest()
        if row["name"] not in FLOATS:
            assert row["rule"] == "copy"
            assert row["why"]
            assert row["v_norm"] is row["t_norm"] is row["v_max"] is row["changed"] is row["inexact"] is None
            continue
        v = accumulated(Raw("F32", raw.shape, bytes(4 * math.prod(raw.shape))), [pair(family, row["name"])], [1.0])
        unsigned = np.dtype(f"u{len(raw.data) // max(1, math.prod(raw.shape)) or 1}")
        changed = int(np.sum(np.frombuffer(data, unsigned) != np.frombuffer(target.data, unsigned)))
        assert (row["rule"], row["why"], row["inexact"]) == ("combine", "", 0)
        assert row["changed"] == changed, row["name"]
        assert row["changed_fraction"] == changed / max(1, v.size)
        moved = widen(raw).astype(np.float64) - widen(target)
        v64 = v.astype(np.float64)
        assert row["nonzero"] == np.count_nonzero(v)
        assert row["absorbed"] == np.count_nonzero((moved == 0) & (v != 0))
        assert row["alpha"] == np.float32(0.7)
        if v.size:
            assert row["realised_alpha"] == pytest.approx(np.dot(moved, v64) / np.dot(v64, v64), rel=1e-9)
            error = np.linalg.norm(moved - row["alpha"] * v64) / (row["alpha"] * np.linalg.norm(v64))
            assert row["relative_error"] == pytest.approx(error, rel=1e-6)
            t64 = widen(target).astype(np.float64)
            cosine = np.dot(v64, t64) / (np.linalg.norm(v64) * np.linalg.norm(t64))
            assert row["cosine"] == pytest.approx(cosine, rel=1e-9, abs=1e-12)
            assert row["v_t_ratio"] == pytest.approx(row["v_norm"] / row["t_norm"])
            assert sum(row["ulps"]) == changed
        assert row["v_max"] == np.max(np.abs(v), initial=0)
        assert math.isclose(row["v_norm"], np.linalg.norm(v.astype(np.float64)), rel_tol=1e-12)
        assert math.isclose(row["t_norm"], np.linalg.norm(widen(target).astype(np.float64)), rel_tol=1e-12)
    assert manifest.totals.changed_elements == sum(row["changed"] or 0 for row in rows)
    assert manifest.totals.v_norm == pytest.approx(math.hypot(*(row["v_norm"] or 0 for row in rows)))


def pair(family: Family, name: str) -> tuple[Raw, Raw]:
    return family.a[name], family.b[name]


@pytest.mark.parametrize("operation", ["transfer", "extract"])
def test_workers_and_memory_change_no_byte(family: Family, tmp_path: Path, operation: str) -> None:
    options = rv.PlanOptions(piece_bytes=4 * MIB, max_shard_bytes=9_000_000)
    folders: list[dict[str, Any]] = []
    for number, (workers, budget) in enumerate([(1, None), (2, None), (5, None), (1, 9 * MIB), (2, 24 * MIB)]):
        run_options = rv.RunOptions(runtime="local", workers=workers, memory_budget_bytes=budget)
        out = tmp_path / str(number)
        if operation == "extract":
            rv.extract(family.donor, family.reference, str(out), plan_options=options, run_options=run_options)
        else:
            transfer(family, out, plan_options=options, run_options=run_options)
        found: dict[str, Any] = dict(files_of(out))
        document = json.loads(found.pop("rv_manifest.json"))
        # It says who made what and when.
        del found["rv_pieces.parquet"]
        document["files"] = [file for file in document["files"] if file["name"] != "rv_pieces.parquet"]
        found["rv_manifest.json"] = {
            key: value for key, value in document.items() if key not in ("timings", "created", "digest")
        }
        folders.append(found)
    for found in folders[1:]:
        assert found.keys() == folders[0].keys()
        for name, content in found.items():
            assert content == folders[0][name], name


def test_the_table_of_tiny_differences_does_not_depend_on_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(47)
    t, a = ({"x": weights(rng, "F32", (3_000_000,), scale)} for scale in (1.0, 1e-11))
    target, vector = write_checkpoint(tmp_path / "t", t), write_checkpoint(tmp_path / "v", a)
    tables = set()
    for number, budget in enumerate([None, 20 * MIB, 9 * MIB]):
        options = rv.RunOptions(runtime="local", workers=1, memory_budget_bytes=budget)
        out = tmp_path / str(number)
        rv.apply(target, {vector: 1.0}, str(out), plan_options=rv.PlanOptions(piece_bytes=8 * MIB), run_options=options)
        tables.add((out / "rv_tensors.parquet").read_bytes())
    assert len(tables) == 1


def test_measures_do_not_depend_on_the_size_of_the_pieces(tmp_path: Path) -> None:
    rng = np.random.default_rng(53)
    models = [{"small": weights(rng, "BF16", (777,)), "x": weights(rng, "BF16", (3_000_001,))} for _ in range(2)]
    target, vector = (write_checkpoint(tmp_path / name, model) for name, model in zip("tv", models, strict=True))
    found = []
    for size in (1, 2, 8, 64):
        out, options = tmp_path / str(size), rv.PlanOptions(piece_bytes=size * MIB)
        manifest = rv.apply(target, {vector: 0.3}, str(out), plan_options=options, run_options=LOCAL)
        rows = read_table((out / "rv_tensors.parquet").read_bytes())
        found.append((manifest.totals, [row._replace(parts=(), digest="") for row in rows]))
    assert found.count(found[0]) == len(found)


def test_bfloat16_inputs_of_a_whole_family_agree_with_float32_arithmetic(tmp_path: Path) -> None:
    rng = np.random.default_rng(53)
    t, a, b = ({"x": weights(rng, "BF16", (1_500_000,))} for _ in range(3))
    uris = [write_checkpoint(tmp_path / name, model) for name, model in (("t", t), ("a", a), ("b", b))]
    rv.transfer(uris[0], uris[1], uris[2], str(tmp_path / "out"), alpha=0.7, plan_options=PLAN, run_options=LOCAL)
    exact = widen(t["x"]) + np.float32(0.7) * (widen(a["x"]) - widen(b["x"]))
    assert read_checkpoint(tmp_path / "out")["x"].data == narrow(exact, "BF16")


@pytest.mark.parametrize("card", [b"---\nlicense: [a\nb: : :\n---\n", b"---\n- a\n---\n", b"\xff\xfe", b""])
def test_a_target_whose_card_is_broken_is_still_a_target(tmp_path: Path, card: bytes) -> None:
    model = {"x": weights(np.random.default_rng(61), "F32", (9,))}
    target = write_checkpoint(tmp_path / "t", model, sidecars={"README.md": card})
    vector = write_checkpoint(tmp_path / "v", model)
    rv.apply(target, {vector: 1.0}, str(tmp_path / "out"), run_options=LOCAL)
    assert_same(read_checkpoint(tmp_path / "out"), {"x": combined(model["x"], [(model["x"], None)], [1.0])})


def test_a_vector_with_nan_has_no_norm_and_no_maximum_in_the_manifest(tmp_path: Path) -> None:
    model = {"x": Raw("F32", (4,), np.array([1, np.nan, 5, 2], np.float32).tobytes())}
    zeros = {"x": Raw("F32", (4,), bytes(16))}
    target, vector = write_checkpoint(tmp_path / "t", zeros), write_checkpoint(tmp_path / "v", model)
    allowed = rv.RunOptions(runtime="local", allow_nonfinite=True)
    manifest = rv.apply(target, {vector: 1.0}, str(tmp_path / "out"), run_options=allowed)
    assert_same(read_checkpoint(tmp_path / "out"), model)
    assert manifest.totals.nan_elements == 1
    assert manifest.totals.v_norm is None
    assert manifest.totals.v_max is None
