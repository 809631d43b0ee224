"""FP8 checkpoints as inputs, in any mixture with others: dequantized on the way, against NumPy and transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import compress, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from fp8_reference import dequantized, fp8_config, random_fp8, write_fp8
from reference import Raw, assert_same, combined, extracted, narrow, read_checkpoint, weights, widen, write_checkpoint
from refusal import run_rv

import rv_distributed as rv
from rv_distributed.checkpoint.table import read_table

MIB = 1 << 20
LOCAL = rv.RunOptions(runtime="local", workers=2)
PLAN = rv.PlanOptions(piece_bytes=MIB, max_shard_bytes=3_000_000)
#: Whole blocks, edges of both kinds, a stack of matrices, less than a block, rows longer than what is computed at once.
SHAPES = {
    "a": (256, 384),
    "b": (300, 200),
    "stack": (3, 130, 70),
    "small": (5, 3),
    "long": (3, 300_001),
    "big": (2100, 900),
}
PLAIN = {"norm": ("F32", (77,)), "embed": ("BF16", (100, 30)), "ids": ("I64", (5,))}
SCALES = {"target": "F32", "donor": "BF16", "reference": "F8_E8M0"}
ROLES = tuple(SCALES)


class Model(NamedTuple):
    """A checkpoint with FP8 weights and what they are in float32, and the same as BF16."""

    fp8: str
    bf16: str
    values: dict[str, Raw]
    rounded: dict[str, Raw]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root, rng, found = tmp_path_factory.mktemp("models"), np.random.default_rng(8), {}
    for role, scale_dtype in SCALES.items():
        stored: dict[str, Raw] = {}
        values: dict[str, Raw] = {}
        for name, shape in SHAPES.items():
            weight, scales = random_fp8(rng, shape, scale_dtype)
            # Names as of linear layers, and as of the stacks of experts that transformers 5 writes.
            full = f"{name}.experts.gate_up_proj" if name == "stack" else f"{name}.weight"
            stored |= {f"{full}_scale_inv": scales, full: weight}
            values[full] = dequantized(weight, scales)
        for name, (dtype, shape) in PLAIN.items():
            stored[name] = values[name] = weights(rng, dtype, shape)
        rounded = {
            name: Raw("BF16", raw.shape, narrow(widen(raw), "BF16")) if name not in PLAIN else raw
            for name, raw in values.items()
        }
        found[role] = Model(
            write_fp8(root / f"{role}-fp8", stored, fp8_config(), shards=2, pad=3),
            write_checkpoint(root / role, rounded),
            values,
            rounded,
        )
    return found


@pytest.mark.parametrize("fp8", list(product([False, True], repeat=3))[1:], ids=str)
def test_every_mixture_of_fp8_and_bf16_is_right_to_the_bit(
    models: dict[str, Model], tmp_path: Path, fp8: tuple[bool, ...]
) -> None:
    inputs = [models[role].fp8 if is_fp8 else models[role].bf16 for role, is_fp8 in zip(ROLES, fp8, strict=True)]
    t, a, b = (models[role].values if is_fp8 else models[role].rounded for role, is_fp8 in zip(ROLES, fp8, strict=True))
    out = tmp_path / "out"
    rv.transfer(inputs[0], inputs[1], inputs[2], str(out), alpha=0.7, plan_options=PLAN, run_options=LOCAL)
    wanted = {
        name: raw
        if raw.dtype == "I64"
        else combined(raw, [(a[name], b[name])], [0.7], "F32" if name == "norm" else "BF16")
        for name, raw in t.items()
    }
    assert_same(read_checkpoint(out), wanted)
    decoded = {row.name: row.decoded for row in read_table((out / "rv_tensors.parquet").read_bytes())}
    roles = ", ".join(compress(ROLES, fp8))
    assert decoded["big.weight"] == (f"{roles}: fp8 128×128" if roles else "")
    assert decoded["norm"] == ""
    done = run_rv("verify", out, "--against-inputs")
    assert done.status == 0, done.stderr


@pytest.mark.gpu
def test_cuda_gives_the_bytes_of_the_cpu(models: dict[str, Model], tmp_path: Path) -> None:
    inputs = [models["target"].fp8, models["donor"].fp8, models["reference"].bf16]
    found = []
    for device in ("cpu", "cuda"):
        how = rv.RunOptions(runtime="local", device=device)
        rv.transfer(inputs[0], inputs[1], inputs[2], str(tmp_path / device), alpha=0.7, run_options=how)
        found.append(read_checkpoint(tmp_path / device))
    assert_same(found[1], found[0])


@pytest.mark.parametrize(("dtype", "name"), [("auto", "BF16"), ("float32", "F32"), ("float16", "F16")])
def test_a_target_without_a_vector_is_dequantized(
    models: dict[str, Model], tmp_path: Path, dtype: str, name: str
) -> None:
    """What nothing is added to is rounded once; the config says no more that weights are quantized."""
    target, out = models["target"], tmp_path / "out"
    inputs = [text for role in ROLES for text in (f"--{role}", models[role].fp8)]
    done = run_rv("transfer", *inputs, "--out", out, "--alpha", "0", "--dtype", dtype, "--runtime", "local")
    assert done.status == 0, done.stderr
    wanted = {}
    for tensor, raw in target.values.items():
        of = raw.dtype if dtype == "auto" and tensor in PLAIN else name
        wanted[tensor] = raw if raw.dtype in (of, "I64") else Raw(of, raw.shape, narrow(widen(raw), of))
    assert_same(read_checkpoint(out), wanted)
    text = (out / "config.json").read_text()
    stated = dtype.replace("auto", "bfloat16")
    assert text == json.dumps({"model_type": "llama", "torch_dtype": stated}, indent=2)
    rules = {row.name: row.rule for row in read_table((out / "rv_tensors.parquet").read_bytes())}
    assert {rules[tensor] for tensor in rules if tensor not in PLAIN} == {"cast"}


def test_a_vector_of_fp8_models_is_exact_in_float32(models: dict[str, Model], tmp_path: Path) -> None:
    donor, reference, out = models["donor"], models["reference"], tmp_path / "out"
    rv.extract(donor.fp8, reference.fp8, str(out), plan_options=PLAN, run_options=LOCAL)
    wanted = {
        name: extracted(raw, reference.values[name], "F32") for name, raw in donor.values.items() if raw.dtype != "I64"
    }
    assert_same(read_checkpoint(out), wanted)
    assert "quantization_config" not in (out / "config.json").read_text()


def test_float64_starts_from_the_float32_that_they_are(models: dict[str, Model], tmp_path: Path) -> None:
    inputs = [models[role].fp8 for role in ROLES]
    options = rv.PlanOptions(compute_dtype="float64", dtype="float32", include="big")
    rv.transfer(inputs[0], inputs[1], inputs[2], str(tmp_path / "out"), alpha=0.7, plan_options=options)
    t, a, b = (widen(models[role].values["big.weight"]).astype(np.float64) for role in ROLES)
    wanted = (t + 0.7 * (a - b)).astype(np.float32).tobytes()
    assert read_checkpoint(tmp_path / "out")["big.weight"].data == wanted


def test_the_plan_and_inspect_say_how_they_are_read(models: dict[str, Model], tmp_path: Path) -> None:
    inputs = [text for role in ROLES for text in (f"--{role}", models[role].fp8)]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out", "--dry-run")
    assert "   decoded  target, donor, reference: fp8 128×128 (" in done.stdout
    assert f"target  {models['target'].fp8}" in done.stdout
    assert "decoding  fp8 128×128 blocks, dequantized" in run_rv("inspect", models["target"].fp8).stdout
    document = json.loads(run_rv("inspect", models["target"].fp8, "--json").stdout)
    assert document["decoding"] == "fp8 128×128 blocks, dequantized"
    assert document["tensors"]["a.weight"]["dtype"] == "F8_E4M3"
    assert (document["tensors"]["a.weight_scale_inv"]["shape"], document["warnings"]) == ([2, 3], [])


def test_transformers_dequantizes_to_the_same_bits(tmp_path: Path) -> None:
    """A tiny Llama whose linear layers are FP8, as transformers reads it without a GPU. It wants whole blocks."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    config = LlamaConfig(**sizes, **heads, dtype="bfloat16")
    plain = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    rng, tensors = np.random.default_rng(2), {}
    for name, tensor in plain.items():
        if "proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = random_fp8(rng, tuple(tensor.shape))
        else:
            tensors[name] = Raw("BF16", tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    stated = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], **fp8_config()}
    model = write_fp8(tmp_path / "model", tensors, stated)
    write_checkpoint(tmp_path / "zero", {"other": Raw("F32", (1,), bytes(4))})
    zero = str(tmp_path / "zero")
    rv.transfer(model, model, zero, str(tmp_path / "out"), alpha=0.0)
    ours = read_checkpoint(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.contiguous().view(torch.uint8).numpy().tobytes() == ours[name].data, name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs)


def test_one_scale_for_each_tensor(tmp_path: Path) -> None:
    """As in Ministral's checkpoints: no block size, and a scalar."""
    rng = np.random.default_rng(5)
    for role in ("donor", "reference"):
        weight, _ = random_fp8(rng, (70, 50))
        scale = weights(rng, "F32", ())
        stored = {"up.weight": weight, "up.weight_scale_inv": scale, "up.activation_scale": scale}
        write_fp8(tmp_path / role, stored, fp8_config(None))
    found = [read_checkpoint(tmp_path / role) for role in ("donor", "reference")]
    a, b = (dequantized(f["up.weight"], f["up.weight_scale_inv"], (70, 50)) for f in found)
    rv.extract(str(tmp_path / "donor"), str(tmp_path / "reference"), str(tmp_path / "out"))
    assert_same(read_checkpoint(tmp_path / "out"), {"up.weight": extracted(a, b, "F32")})
    assert "fp8 with a scale for each tensor, dequantized" in run_rv("inspect", tmp_path / "donor").stdout


def test_blocks_may_have_any_size(tmp_path: Path) -> None:
    rng, block = np.random.default_rng(6), (1, 32)
    for role in ("donor", "reference"):
        weight, scales = random_fp8(rng, (70, 100), "F8_E8M0", block)
        write_fp8(tmp_path / role, {"up.weight": weight, "up.weight_scale_inv": scales}, fp8_config(block))
    found = [read_checkpoint(tmp_path / role) for role in ("donor", "reference")]
    a, b = (dequantized(f["up.weight"], f["up.weight_scale_inv"], block) for f in found)
    rv.extract(str(tmp_path / "donor"), str(tmp_path / "reference"), str(tmp_path / "out"))
    assert_same(read_checkpoint(tmp_path / "out"), {"up.weight": extracted(a, b, "F32")})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_odd_scales_are_numbers_like_others(tmp_path: Path, value: float) -> None:
    """NaN and infinity are found in the output, with the input that brought them; 0 is a scale."""
    rng = np.random.default_rng(7)
    for role in ROLES:
        weight, scales = random_fp8(rng, (256, 130))
        if role == "donor":
            odd = np.frombuffer(scales.data, np.float32).copy()
            odd[3] = value
            scales = scales._replace(data=odd.tobytes())
        write_fp8(tmp_path / role, {"up.weight": weight, "up.weight_scale_inv": scales}, fp8_config())
    inputs = [text for role in ROLES for text in (f"--{role}", tmp_path / role)]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out", "--runtime", "local")
    if value == 0:
        assert done.status == 0
        return
    assert done.status == 2
    # The block of the second row and column: 128 rows of 2 columns.
    assert f"{tmp_path / 'donor'}/model.safetensors: tensor 'up.weight': 256 of 33280 elements are NaN" in done.stderr
    assert f"the first at index {128 * 130 + 128} (target " in done.stderr


def missing(tensors: dict[str, Raw]) -> None:
    del tensors["up.weight_scale_inv"]


def of_another_shape(tensors: dict[str, Raw]) -> None:
    tensors["up.weight_scale_inv"] = Raw("F32", (2, 3), bytes(24))


def of_another_dtype(tensors: dict[str, Raw]) -> None:
    tensors["up.weight_scale_inv"] = Raw("I32", (3, 3), bytes(36))


def in_four_bits(tensors: dict[str, Raw]) -> None:
    tensors["up.weight"] = Raw("I8", (300, 100), bytes(30_000))


def alone(tensors: dict[str, Raw]) -> None:
    del tensors["up.weight"]


SPOILED: list[tuple[Callable[[dict[str, Raw]], None], str, str]] = [
    (missing, "up.weight", "is F8_E4M3 and has no scales, up.weight_scale_inv. Download"),
    (of_another_shape, "up.weight", "scales of shape [2, 3], not [3, 2] for blocks of 128×128"),
    (of_another_dtype, "up.weight", "is F8_E4M3 with scales in I32; read are F8_E4M3 with F32, BF16, F16, F8_E8M0"),
    (in_four_bits, "up.weight", "is I8 with scales in F32; read are F8_E4M3"),
    (alone, "up.weight_scale_inv", "are scales of up.weight, which is missing"),
]


@pytest.mark.parametrize(("spoil", "tensor", "told"), SPOILED, ids=lambda of: getattr(of, "__name__", ""))
@pytest.mark.parametrize("role", ROLES)
def test_weights_and_scales_that_do_not_fit_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Raw]], None], tensor: str, told: str, role: str
) -> None:
    rng = np.random.default_rng(0)
    for of in ROLES:
        weight, scales = random_fp8(rng, (300, 200))
        tensors = {"up.weight": weight, "up.weight_scale_inv": scales, "norm": weights(rng, "F32", (3,))}
        if of == role:
            spoil(tensors)
        write_fp8(tmp_path / of, tensors, fp8_config())
    inputs = [text for of in ROLES for text in (f"--{of}", tmp_path / of)]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out")
    assert done.status == 2
    assert f"{tmp_path / role}: tensor {tensor!r}: " in done.stderr
    assert told in done.stderr
    assert not (tmp_path / "out").exists()
    assert told in run_rv("inspect", tmp_path / role).stdout


@pytest.mark.parametrize(
    "stated",
    [
        {"fmt": "e5m2"},
        {"weight_block_size": [128]},
        {"weight_block_size": [128, 0]},
        {"weight_block_size": [10**30, 128]},
        {"weight_block_size": "128"},
    ],
    ids=str,
)
def test_fp8_of_other_forms_is_refused_with_a_converter(tmp_path: Path, stated: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    weight, scales = random_fp8(rng, (130, 20))
    for role in ROLES:
        tensors = {"up.weight": weight, "up.weight_scale_inv": scales}
        write_fp8(tmp_path / role, tensors, fp8_config(**stated))  # type: ignore[arg-type]  # of any type
    inputs = [text for role in ROLES for text in (f"--{role}", tmp_path / role)]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out")
    assert done.status == 2
    assert "its quant_method is 'fp8'" in done.stderr
    assert "FineGrainedFP8Config(dequantize=True)" in done.stderr
