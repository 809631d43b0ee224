"""``--requantize``: FP8 in, FP8 out, with new scales, against a loop over blocks in NumPy."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from fp8_reference import BLOCK, dequantized, fp8_config, quantized, random_fp8, write_fp8
from reference import (
    TIMED,
    Raw,
    accumulated,
    assert_same,
    combined,
    read_checkpoint,
    weights,
    widen,
    write_checkpoint,
)
from refusal import run_rv
from rounding_reference import noise32

import rv_distributed as rv
from rv_distributed.checkpoint.table import TensorRow, read_table
from rv_distributed.outcome import oddities
from rv_distributed.plan import task_of
from rv_distributed.recipe import Recipe, Vector
from rv_distributed.runtime.chunks import cut_chunks
from rv_distributed.runtime.dry import dry_config
from rv_distributed.runtime.recompute import recompute

MIB = 1 << 20
#: "big" is cut by borders of pieces and chunks, in its rows of blocks; those of "wide" are longer than a chunk.
SHAPES = {"a": (256, 384), "b": (300, 200), "stack": (3, 130, 70), "big": (900, 1900), "wide": (140, 9000)}
FP8 = [f"{name}.weight" for name in SHAPES]
PLAIN = {"norm": ("F32", (77,)), "embed": ("BF16", (100, 30)), "steps": ("I64", (5,))}
#: Small chunks, so that all of that happens.
SMALL = rv.RunOptions(runtime="local", workers=1, memory_budget_bytes=84 * MIB)
REQUANTIZE = rv.PlanOptions(requantize=True, piece_bytes=MIB, max_shard_bytes=3_000_000)


class Model(NamedTuple):
    """A checkpoint with FP8 weights, what is in it, and what its tensors are in float32."""

    uri: str
    stored: dict[str, Raw]
    values: dict[str, Raw]


def make(folder: Path, seed: int, scale_dtype: str, **config: object) -> Model:
    rng = np.random.default_rng(seed)
    stored: dict[str, Raw] = {}
    values: dict[str, Raw] = {}
    for name, shape in SHAPES.items():
        weight, scales = random_fp8(rng, shape, scale_dtype)
        stored |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scales}
        values[f"{name}.weight"] = dequantized(weight, scales)
    for name, (dtype, shape) in PLAIN.items():
        stored[name] = values[name] = weights(rng, dtype, shape)
    stored["a.input_scale"] = weights(rng, "F32", ())
    return Model(write_fp8(folder, stored, fp8_config(**config), shards=2), stored, values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    return {
        "F32": make(root / "F32", 1, "F32"),
        "BF16": make(root / "BF16", 2, "BF16"),
        "ue8m0": make(root / "ue8m0", 3, "F32", scale_fmt="ue8m0"),
        "F8_E8M0": make(root / "F8_E8M0", 4, "F8_E8M0", scale_fmt="ue8m0"),
        "donor": make(root / "donor", 5, "F32"),
        "reference": make(root / "reference", 6, "BF16"),
    }


def transfer(models: dict[str, Model], target: str, out: Path, **how: Any) -> dict[str, Raw]:
    options = {"plan_options": REQUANTIZE, "run_options": SMALL, "alpha": 0.7, **how}
    uris = [models[of].uri for of in (target, "donor", "reference")]
    rv.transfer(uris[0], uris[1], uris[2], str(out), **options)
    return read_checkpoint(out)


def summed(models: dict[str, Model], target: str, name: str, alpha: float = 0.7) -> Any:
    t, a, b = (models[of].values[name] for of in (target, "donor", "reference"))
    return accumulated(t, [(a, b)], [alpha])


def rows_of(out: Path) -> dict[str, TensorRow]:
    return {row.name: row for row in read_table((out / "rv_tensors.parquet").read_bytes())}


@pytest.mark.parametrize("target", ["F32", "BF16", "ue8m0", "F8_E8M0"])
def test_weights_and_scales_are_those_of_a_loop_over_blocks(
    models: dict[str, Model], tmp_path: Path, target: str
) -> None:
    out = tmp_path / "out"
    found = transfer(models, target, out)
    scale_dtype = models[target].stored["a.weight_scale_inv"].dtype
    powers = "8" in target or "E8M0" in target
    wanted: dict[str, Raw] = {}
    for name in FP8:
        values = summed(models, target, name)
        shape = models[target].stored[name].shape
        wanted[name], wanted[f"{name}_scale_inv"] = quantized(values, shape, scale_dtype, powers=powers)
    for name in PLAIN:
        t, a, b = (models[of].stored[name] for of in (target, "donor", "reference"))
        wanted[name] = t if name == "steps" else combined(t, [(a, b)], [0.7])
    wanted["a.input_scale"] = models[target].stored["a.input_scale"]
    assert_same({name: found[name] for name in sorted(found)}, {name: wanted[name] for name in sorted(wanted)})
    # Everything else is as of any output.
    assert (out / "config.json").read_bytes() == (Path(models[target].uri) / "config.json").read_bytes()
    for check in ([], ["--against-inputs"]):
        done = run_rv("verify", out, *check)
        assert done.status == 0, done.stderr
    rows = rows_of(out)
    assert {rows[name].rule for name in FP8} == {"combine"}
    assert {rows[f"{name}_scale_inv"].rule for name in FP8} == {"scale"}
    assert rows["a.weight_scale_inv"].why == "scales of requantized weights"


def test_transformers_quantizes_to_the_same_bits(models: dict[str, Model], tmp_path: Path) -> None:
    """Its own operation, on what is in whole blocks; for powers of 2 as well."""
    import torch
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    for target in ("F32", "F8_E8M0"):
        found = transfer(models, target, tmp_path / target)
        values = torch.from_numpy(summed(models, target, "a.weight").reshape(256, 384).copy())
        config = FineGrainedFP8Config(scale_fmt="ue8m0" if target == "F8_E8M0" else "float")
        quantizer = type("Quantizer", (), {"quantization_config": config})()
        theirs = Fp8Quantize(quantizer).convert({"a.weight": values})
        for name, tensor in theirs.items():
            assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == found[name].data, (target, name)


def test_scales_have_files_of_their_own(models: dict[str, Model], tmp_path: Path) -> None:
    transfer(models, "F32", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    last = max(index.values())
    assert {name for name, file in index.items() if file == last} == {f"{name}_scale_inv" for name in FP8}
    pieces = rv.prepare(recipe(models), [str(tmp_path / "other")], REQUANTIZE, SMALL).plan
    assert {pieces.shards[piece.shard].name for piece in pieces.pieces} == set(index.values()) - {last}


def recipe(models: dict[str, Model], target: str = "F32") -> Recipe:
    pair = Vector(models["donor"].uri, models["reference"].uri)
    return Recipe("transfer", models[target].uri, (pair,), ((0.7,),))


def files_of(out: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in out.iterdir() if path.name not in TIMED and path.name != "README.md"
    }


def test_bands_are_cut_in_every_way(models: dict[str, Model], tmp_path: Path) -> None:
    """Or the other tests would show nothing: by the border of a piece, by that of a chunk, and by two of those."""
    job = rv.prepare(recipe(models), [str(tmp_path / "out")], REQUANTIZE, SMALL)
    assert (job.sizing.streams, job.sizing.chunk_bytes) == (1, MIB // 2)
    tasks = [task_of(job.plan, piece) for piece in job.plan.pieces]
    parts = [part for task in tasks for chunk in cut_chunks(task, MIB // 2) for part in chunk.parts]
    assert any(part.skip for part in parts)
    assert any(0 < part.carried < part.nbytes for part in parts)
    assert any(part.carried == part.nbytes for part in parts)


def test_threads_chunks_and_pieces_make_no_difference(models: dict[str, Model], tmp_path: Path) -> None:
    transfer(models, "F32", tmp_path / "one")
    many = rv.RunOptions(runtime="local", workers=5)
    transfer(models, "F32", tmp_path / "two", run_options=many)
    larger = rv.PlanOptions(requantize=True, piece_bytes=4 * MIB, max_shard_bytes=3_000_000)
    transfer(models, "F32", tmp_path / "three", run_options=many, plan_options=larger)
    one, two, three = (files_of(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert {name for name in one if one[name] != three[name]} <= {"rv_tensors.parquet"}
    # Of the measures, too, only the parts differ.
    rows = [
        {name: row._replace(parts=(), digest="") for name, row in rows_of(tmp_path / of).items()}
        for of in ("one", "three")
    ]
    assert rows[0] == rows[1]


def test_what_was_realised_is_measured_against_what_the_output_is_read_as(
    models: dict[str, Model], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = transfer(models, "F32", out)
    rows = rows_of(out)
    for name in FP8:
        t, a, b = (widen(models[of].values[name]).astype(np.float64) for of in ("F32", "donor", "reference"))
        v = (a.astype(np.float32) - b.astype(np.float32)).astype(np.float64)
        o = widen(dequantized(found[name], found[f"{name}_scale_inv"])).astype(np.float64)
        row = rows[name]
        assert row.v_norm == pytest.approx(np.linalg.norm(v))
        assert row.t_norm == pytest.approx(np.linalg.norm(t))
        assert row.realised_alpha == pytest.approx((o - t) @ v / (v @ v))
        assert row.relative_error == pytest.approx(
            np.linalg.norm(o - t - np.float32(0.7) * v) / np.linalg.norm(0.7 * v)
        )
        assert [row.nonzero, row.changed] == [np.count_nonzero(v), np.count_nonzero(o != t)]
        assert row.absorbed == np.count_nonzero((o == t) & (v != 0))
        assert (row.ulps, row.ulps_max, row.nan) == (None, None, 0)
    manifest = json.loads((out / "rv_manifest.json").read_text())
    assert manifest["totals"]["realised_alpha"] == pytest.approx(0.7, abs=0.01)
    assert manifest["options"]["requantize"] == "fp8"


def test_stochastic_rounding_draws_for_each_element_what_it_always_draws(
    models: dict[str, Model], tmp_path: Path
) -> None:
    options = rv.PlanOptions(requantize=True, piece_bytes=MIB, rounding="stochastic", seed=11)
    found = transfer(models, "F32", tmp_path / "out", plan_options=options)
    for name in FP8:
        shape = models["F32"].stored[name].shape
        signed = noise32(11, name, 0, math.prod(shape)).view(np.int32) >> 9
        uniform = signed.astype(np.float64) * 2.0**-23 + 0.5 + 2.0**-24
        weight, scales = quantized(summed(models, "F32", name), shape, uniform=uniform)
        assert found[name].data == weight.data
        assert found[f"{name}_scale_inv"].data == scales.data
    nearest = transfer(models, "F32", tmp_path / "nearest")
    assert nearest["big.weight"].data != found["big.weight"].data
    assert nearest["big.weight_scale_inv"] == found["big.weight_scale_inv"]


def test_changes_that_fp8_is_too_coarse_for_are_lost_to_nearest_and_right_on_average_by_chance(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    weight, scales = random_fp8(rng, (512, 512))
    target = write_fp8(tmp_path / "target", {"w": weight, "w_scale_inv": scales}, fp8_config())
    values = widen(dequantized(weight, scales))
    # 0.4 % of each weight, up or down; E4M3 has steps of 6 to 12 %.
    signs = rng.choice(np.array([-0.004, 0.004], np.float32), values.size)
    write_checkpoint(tmp_path / "donor", {"w": Raw("F32", (512, 512), (values + values * signs).tobytes())})
    write_checkpoint(tmp_path / "reference", {"w": Raw("F32", (512, 512), values.tobytes())})
    realised: list[float | None] = []
    told: list[str] = []
    for rounding in ("nearest", "stochastic"):
        options = rv.PlanOptions(requantize=True, rounding=rounding)
        inputs = (target, str(tmp_path / "donor"), str(tmp_path / "reference"))
        manifest = rv.transfer(*inputs, str(tmp_path / rounding), plan_options=options)
        realised.append(manifest.totals.realised_alpha)
        told += oddities("out", manifest)
    assert realised[0] is not None
    assert abs(realised[0]) < 0.5
    assert realised[1] == pytest.approx(1.0, abs=0.05)
    (warning,) = told
    assert "--rounding stochastic realises it on average; without --requantize there is less rounding." in warning


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_several_vectors_and_several_alphas(models: dict[str, Model], tmp_path: Path, compute_dtype: Any) -> None:
    """A sweep, and an apply of two vectors; the sum is rounded to float32 before it is quantized."""
    dtype = np.dtype(compute_dtype)
    inputs = ["--target", models["F32"].uri, "--donor", models["donor"].uri, "--reference", models["reference"].uri]
    more = ["--alpha", "0,0.5,-1", "--requantize", "--compute-dtype", compute_dtype, "--runtime", "local"]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out-{alpha}", *more)
    assert done.status == 0, done.stderr
    t, a, b = (widen(models[of].values["b.weight"]).astype(dtype) for of in ("F32", "donor", "reference"))
    for alpha in ("0", "0.5", "-1"):
        total = t + dtype.type(float(alpha)) * (a - b) if float(alpha) else t
        wanted = quantized(total.astype(np.float32), (300, 200))
        found = read_checkpoint(tmp_path / f"out-{alpha}")
        assert (found["b.weight"].data, found["b.weight_scale_inv"].data) == (wanted[0].data, wanted[1].data), alpha
    for name in ("donor", "reference"):
        rv.extract(models[name].uri, models["F32"].uri, str(tmp_path / name))
    pairs = [(str(tmp_path / "donor"), 0.5), (str(tmp_path / "reference"), -0.25)]
    options = rv.PlanOptions(requantize=True, compute_dtype=compute_dtype)
    rv.apply(models["F32"].uri, pairs, str(tmp_path / "applied"), plan_options=options)
    for name, scale in (("donor", 0.5), ("reference", -0.25)):
        v = widen(read_checkpoint(tmp_path / name)["b.weight"]).astype(dtype)
        t = t + dtype.type(scale) * v
    wanted = quantized(t.astype(np.float32), (300, 200))
    found = read_checkpoint(tmp_path / "applied")
    assert (found["b.weight"].data, found["b.weight_scale_inv"].data) == (wanted[0].data, wanted[1].data)


RECIPES: dict[str, dict[str, Any]] = {
    "task arithmetic": {
        "operation": "task_arithmetic",
        "vectors": [
            {"vector": "one", "alpha": 0.5},
            {"vector": "two", "alpha": [{"match": "^b", "alpha": 0.0}, {"alpha": 2.0}]},
        ],
        "normalize": True,
        "scale": 0.75,
    },
    "apply by tensor": {"vectors": [{"vector": "one", "alpha": [{"match": "big", "alpha": 0.25}, {"alpha": -1.0}]}]},
    "linear": {"vectors": [{"model": "F32", "alpha": 0.3}, {"model": "donor", "alpha": 0.7}], "target": None},
}


@pytest.mark.parametrize("case", RECIPES)
def test_whatever_is_computed_fp8_is_what_float32_quantizes_to(
    models: dict[str, Model], tmp_path: Path, case: str
) -> None:
    for name, of in (("one", "donor"), ("two", "reference")):
        rv.extract(models[of].uri, models["F32"].uri, str(tmp_path / name), plan_options=rv.PlanOptions(include="^b"))
    document = json.loads(json.dumps({"target": models["F32"].uri, **RECIPES[case]}))
    document = {field: value for field, value in document.items() if value is not None}
    for vector in document["vectors"]:
        vector |= {"model": models[vector["model"]].uri} if "model" in vector else {}
    for name, more in (("float32", {"dtype": "float32"}), ("fp8", {"requantize": True})):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**document, **more}))
        done = run_rv("run", tmp_path / f"{name}.yaml", "--out", tmp_path / name, "--runtime", "local")
        assert done.status == 0, done.stderr
    whole, found = read_checkpoint(tmp_path / "float32"), read_checkpoint(tmp_path / "fp8")
    touched = {"big.weight", "b.weight"} if case != "linear" else set(FP8)
    for name in touched:
        wanted = quantized(widen(whole[name]), whole[name].shape)
        assert (found[name].data, found[f"{name}_scale_inv"].data) == (wanted[0].data, wanted[1].data), name
    norms = [rows_of(tmp_path / out)["big.weight"].v_norm for out in ("fp8", "float32")]
    assert norms[0] == pytest.approx(norms[1])
    done = run_rv("verify", tmp_path / "fp8", "--against-inputs")
    assert done.status == 0, done.stderr


@pytest.mark.gpu
def test_beside_cuda_the_processor_quantizes_to_the_same_bytes(models: dict[str, Model], tmp_path: Path) -> None:
    found = [
        transfer(models, "F32", tmp_path / device, run_options=rv.RunOptions(runtime="local", device=device))
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


def test_tensors_that_get_no_vector_keep_their_bytes_and_scales(models: dict[str, Model], tmp_path: Path) -> None:
    options = rv.PlanOptions(requantize=True, include=r"^(big|norm)")
    found = transfer(models, "BF16", tmp_path / "out", plan_options=options)
    stored = models["BF16"].stored
    assert {name for name in stored if found[name] != stored[name]} == {"big.weight", "big.weight_scale_inv", "norm"}
    rows = rows_of(tmp_path / "out")
    assert rows["a.weight"].rule == rows["a.weight_scale_inv"].rule == "copy"
    done = run_rv("verify", tmp_path / "out", "--against-inputs")
    assert done.status == 0, done.stderr


def test_a_run_that_was_stopped_goes_on_and_keeps_the_scales(models: dict[str, Model], tmp_path: Path) -> None:
    transfer(models, "F32", tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(now: Any) -> None:
        if now.pieces >= 1:
            raise Stop

    with pytest.raises(Stop):
        transfer(models, "F32", tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    transfer(models, "F32", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "rv_manifest.json").read_text())
    assert 1 <= manifest["timings"]["pieces_kept"] < manifest["timings"]["pieces"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("tensor", ["big.weight", "big.weight_scale_inv", "wide.weight_scale_inv"])
def test_every_flipped_byte_is_found(models: dict[str, Model], tmp_path: Path, tensor: str) -> None:
    """By the digests; and, forged with them, against the inputs."""
    out = tmp_path / "out"
    transfer(models, "F32", out)
    of = rv.open_checkpoint(out).tensors[tensor]
    place = of.stop - 7
    path = out / of.file
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x04
    path.write_bytes(raw)
    done = run_rv("verify", out, "--json")
    assert done.status == 3
    (finding,) = json.loads(done.stdout)["findings"]
    assert (finding["file"], finding["tensor"]) == (of.file, tensor)
    job = rv.prepare(recipe(models), [str(tmp_path / "other")], REQUANTIZE, SMALL)
    plan = job.plan
    config = dry_config(plan, output=str(out), stats="none")
    tasks = [task_of(plan, piece) for piece in plan.pieces]
    differences = [difference for found in recompute(tasks, config) for difference in found]
    assert [(d.shard, d.tensor, d.start, d.stop) for d in differences] == [(of.file, tensor, place, place + 1)]


def test_a_nan_stays_where_it_is_and_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for role in ("target", "donor", "reference"):
        weight, scales = random_fp8(rng, (256, 256))
        if role == "donor":
            bits = bytearray(weight.data)
            bits[300] = 0x7F
            weight = weight._replace(data=bytes(bits))
        write_fp8(tmp_path / role, {"w": weight, "w_scale_inv": scales}, fp8_config())
    inputs = [text for role in ("target", "donor", "reference") for text in (f"--{role}", tmp_path / role)]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out", "--requantize", "--runtime", "local")
    assert done.status == 2
    told = f"{tmp_path / 'donor'}/model.safetensors: tensor 'w': 1 of 65536 elements are NaN or infinite"
    assert told in done.stderr
    assert "the first at index 300 " in done.stderr


def test_blocks_of_zeros_and_of_next_to_nothing(tmp_path: Path) -> None:
    values = np.zeros((256, 256), np.float32)
    values[128:, :128], values[128:, 128:] = 1e-35, 3.0
    values[200, 200] = -1e38
    rng = np.random.default_rng(3)
    _, scales = random_fp8(rng, (256, 256))
    zeros = Raw("F8_E4M3", (256, 256), bytes(256 * 256))
    write_fp8(tmp_path / "target", {"w": zeros, "w_scale_inv": scales}, fp8_config())
    write_checkpoint(tmp_path / "vector", {"w": Raw("F32", (256, 256), values.tobytes())})
    options = rv.PlanOptions(requantize=True)
    rv.apply(str(tmp_path / "target"), {str(tmp_path / "vector"): 1.0}, str(tmp_path / "out"), plan_options=options)
    wanted = quantized(values, (256, 256))
    assert_same(read_checkpoint(tmp_path / "out"), {"w": wanted[0], "w_scale_inv": wanted[1]})
    assert np.frombuffer(wanted[1].data, np.float32)[:3].tolist() == [1, 1, 1]


def test_other_block_sizes(tmp_path: Path) -> None:
    rng, block = np.random.default_rng(6), (1, 32)
    made = {}
    for role in ("target", "donor", "reference"):
        weight, scales = random_fp8(rng, (70, 100), "F8_E8M0", block)
        made[role] = dequantized(weight, scales, block)
        write_fp8(tmp_path / role, {"w": weight, "w_scale_inv": scales}, fp8_config(block))
    uris = [str(tmp_path / role) for role in made]
    options = rv.PlanOptions(requantize=True)
    rv.transfer(uris[0], uris[1], uris[2], str(tmp_path / "out"), plan_options=options)
    values = accumulated(made["target"], [(made["donor"], made["reference"])], [1.0])
    wanted = quantized(values, (70, 100), "F8_E8M0", powers=True, block=block)
    assert_same(read_checkpoint(tmp_path / "out"), {"w": wanted[0], "w_scale_inv": wanted[1]})


def test_a_target_with_an_adapter_becomes_fp8_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    weight, scales = random_fp8(rng, (256, 130))
    base = write_fp8(tmp_path / "base", {"up.weight": weight, "up.weight_scale_inv": scales}, fp8_config())
    b, a = weights(rng, "F32", (256, 2)), weights(rng, "F32", (2, 130))
    write_checkpoint(tmp_path / "ad", {"up.lora_A.weight": a, "up.lora_B.weight": b})
    (tmp_path / "ad" / "model.safetensors").rename(tmp_path / "ad" / "adapter_model.safetensors")
    (tmp_path / "ad" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    both = f"{base}+{tmp_path / 'ad'}"
    rv.transfer(both, both, base, str(tmp_path / "out"), alpha=0.0, plan_options=rv.PlanOptions(requantize=True))
    delta = widen(b).reshape(256, 2)[:, :1] * widen(a)[:130] + widen(b).reshape(256, 2)[:, 1:] * widen(a)[130:]
    wanted = quantized(widen(dequantized(weight, scales)) + delta.reshape(-1), (256, 130))
    assert_same(read_checkpoint(tmp_path / "out"), {"up.weight": wanted[0], "up.weight_scale_inv": wanted[1]})


def test_what_cannot_be_requantized_is_refused(models: dict[str, Model], tmp_path: Path) -> None:
    def told(target: str | Path, *more: str) -> str:
        inputs = ["--target", target, "--donor", models["donor"].uri, "--reference", models["reference"].uri]
        done = run_rv("transfer", *inputs, "--out", tmp_path / "out", "--requantize", *more)
        assert done.status == 2
        assert not (tmp_path / "out").exists()
        return done.stderr

    plain = write_checkpoint(tmp_path / "plain", {name: models["F32"].values[name] for name in FP8})
    assert "has no FP8 weights with scales, which --requantize writes. Leave out --requantize" in told(plain)
    assert "leave out --dtype float16" in told(models["F32"].uri, "--dtype", "float16")
    coarse = Path(shutil.copytree(models["F32"].uri, tmp_path / "coarse"))
    config = json.loads((coarse / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = None
    (coarse / "config.json").write_text(json.dumps(config))
    assert "has one scale for each tensor, which --requantize does not write" in told(coarse)
    done = run_rv(
        "extract",
        "--donor",
        models["F32"].uri,
        "--reference",
        models["donor"].uri,
        "--out",
        tmp_path / "v",
        "--requantize",
    )
    assert (done.status, "--requantize is for models" in done.stderr) == (2, True)


def test_too_little_memory_is_said_before_anything_is_read(models: dict[str, Model], tmp_path: Path) -> None:
    inputs = ["--target", models["F32"].uri, "--donor", models["donor"].uri, "--reference", models["reference"].uri]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out", "--requantize", "--memory-budget", "20MB")
    assert (done.status, "--memory-budget: this run needs at least" in done.stderr) == (2, True)
    assert BLOCK == (128, 128)


def test_reports_and_the_summary_know_of_scales(models: dict[str, Model], tmp_path: Path) -> None:
    inputs = ["--target", models["F32"].uri, "--donor", models["donor"].uri, "--reference", models["reference"].uri]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out", "--requantize", "--dry-run")
    assert "requantized" in done.stdout
    transfer(models, "F32", tmp_path / "out")
    done = run_rv("report", tmp_path / "out", "--format", "md", "--out", "-")
    assert done.status == 0, done.stderr
    assert "scales of requantized weights" in done.stdout
