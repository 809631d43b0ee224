"""`rv diff`, against NumPy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from fp8_reference import dequantized, fp8_config, random_fp8, write_fp8
from reference import Raw, read_checkpoint, weights, widen, write_checkpoint
from refusal import run_rv, tree

import rv_distributed as rv

SHAPES = {
    "embed": (40, 8),
    "model.layers.0.mlp.up": (700, 1001),
    "model.layers.1.mlp.up": (64, 64),
    "model.visual.blocks.0.x": (5,),
    "norm": (8,),
    "empty": (0, 3),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a`` and ``b``: in parts the same, in other dtypes, and with tensors that the other has not or has otherwise."""
    root, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(3)
    b = {name: weights(rng, "BF16", shape) for name, shape in SHAPES.items()}
    b |= {"norm": weights(rng, "F16", (8,)), "ids": Raw("I64", (9,), rng.bytes(72))}
    a = dict(reversed(b.items()))
    a["model.layers.0.mlp.up"] = weights(rng, "F32", (700, 1001))
    moved = widen(b["embed"]).copy()
    moved[::5] *= 1.5
    a["embed"] = Raw("F32", (40, 8), moved.tobytes())
    a["ids"] = Raw("I64", (9,), b["ids"].data[:64] + bytes(8))
    a |= {"other": weights(rng, "F32", (4, 2)), "only a": weights(rng, "F32", (2,))}
    b |= {
        "other": weights(rng, "F32", (2, 4)),
        "only b": weights(rng, "F32", (2,)),
        "typed": Raw("I32", (1,), bytes(4)),
    }
    a["typed"] = Raw("F32", (1,), bytes(4))
    write_checkpoint(root / "a", a, shards=3, pad=5)
    write_checkpoint(root / "b", b)
    return root


def test_norms_counts_and_lists_are_those_of_numpy(models: Path) -> None:
    before = tree(models)
    found = rv.diff(models / "a", str(models / "b"))
    assert tree(models) == before
    a, b = read_checkpoint(models / "a"), read_checkpoint(models / "b")
    measured = [tensor.name for tensor in found.tensors if tensor.is_measured]
    assert measured == list(SHAPES)
    for tensor in found.tensors:
        if tensor.name == "ids":
            assert (tensor.sums.differing, tensor.sums.elements) == (1, 9)
            continue
        x, y = widen(a[tensor.name]), widen(b[tensor.name])
        d, sums = (x - y).astype(np.float64), tensor.sums
        assert (tensor.a_dtype, tensor.b_dtype, tensor.shape) == (*a[tensor.name][:1], *b[tensor.name][:2])
        assert (sums.differing, sums.elements) == (int(np.count_nonzero(x != y)), x.size)
        assert sums.norm == pytest.approx(np.linalg.norm(d), rel=1e-12)
        assert sums.a_norm == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=1e-6)
        assert sums.b_norm == pytest.approx(np.linalg.norm(y.astype(np.float64)), rel=1e-12)
        assert sums.largest == np.abs(d).max(initial=0)
        if x.size:
            norms = np.linalg.norm(x.astype(np.float64)), np.linalg.norm(y.astype(np.float64))
            assert sums.cosine == pytest.approx(np.dot(x.astype(np.float64), y) / (norms[0] * norms[1]), rel=1e-6)
            assert sums.relative == pytest.approx(np.linalg.norm(d) / norms[1], rel=1e-12)
        else:
            assert (sums.cosine, sums.relative) == (None, None)
    assert [unlike.name for unlike in found.unlike] == ["other", "typed"]
    assert (found.only_in_a, found.only_in_b) == (("only a",), ("only b",))
    assert not found.is_same
    layers = [(layer.stack, layer.layer, layer.sums.tensors) for layer in found.layers]
    assert layers == [("", None, 4), ("", 0, 1), ("", 1, 1), ("visual", 0, 1)]
    total = sum(tensor.sums.d_sq for tensor in found.tensors)
    assert found.total.d_sq == pytest.approx(total)
    assert [tensor.name for tensor in found.most_changed(2)] == ["model.layers.0.mlp.up", "embed"]


def test_what_people_programs_and_tables_get(models: Path, tmp_path: Path) -> None:
    shown = run_rv("diff", models / "a", models / "b")
    assert shown.status == 0
    for told in ("all, 7 tensors", "visual layer 0", "only in A: only a", "only in B: only b", "other F32 [4, 2] and"):
        assert told in shown.stdout
    table = tmp_path / "changes.parquet"
    document = json.loads(run_rv("diff", models / "a", models / "b", "--json", "--parquet", table).stdout)
    assert [row["name"] for row in document["tensors"]] == [*SHAPES, "ids"]
    assert pq.read_table(table).to_pylist() == document["tensors"]
    refused = run_rv("diff", models / "a", models / "b", "--parquet", table)
    assert (refused.status, "already exists" in refused.stderr) == (2, True)
    assert run_rv("diff", models / "a", models / "b", "--parquet", table, "--overwrite", "--quiet").stdout == ""


def test_the_exit_status_tells_of_differences_only_when_asked(models: Path, tmp_path: Path) -> None:
    assert run_rv("diff", models / "a", models / "b", "--exit-code", "--quiet").status == 3
    same = run_rv("diff", models / "a", models / "a", "--exit-code")
    assert same.status == 0
    assert "the same: 10 tensors" in same.stdout
    assert run_rv("diff", models / "a", tmp_path / "gone").status == 2


def test_nan_is_a_difference_and_leaves_no_numbers(tmp_path: Path) -> None:
    values = np.ones(8, np.float32)
    write_checkpoint(tmp_path / "b", {"x": Raw("F32", (8,), values.tobytes())})
    values[3] = np.nan
    write_checkpoint(tmp_path / "a", {"x": Raw("F32", (8,), values.tobytes())})
    told = run_rv("diff", tmp_path / "a", tmp_path / "b").stdout
    document = json.loads(run_rv("diff", tmp_path / "a", tmp_path / "b", "--json").stdout)
    (row,) = document["tensors"]
    assert (row["differing"], row["norm"], row["cosine"], row["largest"]) == (1, None, None, None)
    assert (row["nonfinite"], document["total"]["nonfinite"]) == (1, 1)
    assert "1 element NaN or infinite in A, B or their difference, which leaves no norms: x (1)\n" in told


def test_a_difference_that_overflows_leaves_no_numbers(tmp_path: Path) -> None:
    for name, value in (("a", 3e38), ("b", -3e38)):
        write_checkpoint(tmp_path / name, {"x": Raw("F32", (8,), np.full(8, value, np.float32).tobytes())})
    told = run_rv("diff", tmp_path / "a", tmp_path / "b").stdout
    assert "8 elements NaN or infinite in A, B or their difference, which leaves no norms: x (8)\n" in told


def test_progress_is_told(models: Path) -> None:
    seen: list[tuple[int, int]] = []
    rv.diff(models / "a", models / "b", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


def test_what_is_decoded_is_compared_as_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    weight, scales = random_fp8(rng, (300, 200), "F32")
    values, ids = dequantized(weight, scales), Raw("I64", (9,), rng.bytes(72))
    write_fp8(tmp_path / "fp8", {"x.weight": weight, "x.weight_scale_inv": scales, "ids": ids}, fp8_config())
    write_checkpoint(tmp_path / "plain", {"x.weight": values, "ids": Raw("I64", (9,), ids.data[:-8] + bytes(8))})
    write_checkpoint(tmp_path / "zeros", {"x.weight": Raw("F32", (300, 200), bytes(240_000)), "ids": ids})
    for a, b, nbytes in (("fp8", "plain", 240_072), ("plain", "fp8", 120_072)):
        told: list[tuple[int, int]] = []
        found = rv.diff(tmp_path / a, tmp_path / b, progress=lambda *now: told.append(now))  # noqa: B023
        assert {tensor.name: tensor.sums.differing for tensor in found.tensors} == {"x.weight": 0, "ids": 1}
        assert not found.unlike + found.only_in_a + found.only_in_b
        assert told[-1] == (nbytes, nbytes)
    (x,) = (tensor for tensor in rv.diff(tmp_path / "fp8", tmp_path / "zeros").tensors if tensor.is_measured)
    assert (x.a_dtype, x.b_dtype) == ("F8_E4M3", "F32")
    assert x.sums.norm == pytest.approx(float(np.linalg.norm(widen(values).astype(np.float64))))
