"""What is decoded meets other names, layouts and dtypes: the rules apply to it as to any tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fp8_reference import dequantized, fp8_config, quantized, random_fp8
from lora_reference import delta, write_adapter
from reference import Raw, Tensors, accumulated, assert_same, combined, read_checkpoint, weights, widen
from refusal import ROLES, assert_refused, transfer
from triples import ALPHA, ok, rows_of, transferred, write_models

EXPERTS, HIDDEN = 3, 200
#: Rows of an expert's gate: as many as a block has, so that all parts of a fused tensor begin where blocks do.
INNER = 128
MODULE = "model.layers.0.mlp.experts"
GATE_UP = f"{MODULE}.gate_up_proj"


def parts_of(inner: int) -> dict[str, tuple[int, int]]:
    return {f"{MODULE}.{n}.{part}_proj.weight": (inner, HIDDEN) for n in range(EXPERTS) for part in ("gate", "up")}


def split(seed: int, dtype: str, inner: int = INNER) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: weights(rng, dtype, shape) for name, shape in parts_of(inner).items()}


def fused(parts: Tensors, inner: int = INNER) -> Raw:
    """All parts in one."""
    dtype = next(iter(parts.values())).dtype
    return Raw(dtype, (EXPERTS, 2 * inner, HIDDEN), b"".join(parts[name].data for name in parts_of(inner)))


def fp8_split(seed: int) -> tuple[Tensors, Tensors]:
    """Experts in FP8 with their scales, and what they are in float32."""
    rng, stored, values = np.random.default_rng(seed), dict[str, Raw](), dict[str, Raw]()
    for name, shape in parts_of(INNER).items():
        stored[name], stored[f"{name}_scale_inv"] = random_fp8(rng, shape)
        values[name] = dequantized(stored[name], stored[f"{name}_scale_inv"])
    return stored, values


def fp8_fused(seed: int, inner: int = INNER) -> tuple[Tensors, Raw]:
    weight, scales = random_fp8(np.random.default_rng(seed), (EXPERTS, 2 * inner, HIDDEN))
    return {GATE_UP: weight, f"{GATE_UP}_scale_inv": scales}, dequantized(weight, scales)


def write(folder: Path, target: Tensors, donor: Tensors, reference: Tensors) -> Path:
    tensors = dict(zip(ROLES, (target, donor, reference), strict=True))
    has_fp8 = {role: any(raw.dtype == "F8_E4M3" for raw in tensors[role].values()) for role in ROLES}
    configs: dict[str, Any] = {role: fp8_config() if has_fp8[role] else {} for role in ROLES}
    return write_models(folder, tensors, configs=configs)


@pytest.mark.parametrize("fp8", ["target", "donor", "both"])
def test_experts_in_fp8_meet_fused_ones(tmp_path: Path, fp8: str) -> None:
    t_stored, t = fp8_split(0) if fp8 != "donor" else (split(0, "BF16"), split(0, "BF16"))
    a_stored, a_values = fp8_split(1) if fp8 != "target" else (split(1, "F32"), split(1, "F32"))
    b = split(2, "F16")
    models = write(tmp_path, t_stored, a_stored, {GATE_UP: fused(b)})
    found, said = transferred(models)
    assert_same(found, {name: combined(raw, [(a_values[name], b[name])], [ALPHA], "BF16") for name, raw in t.items()})
    row = rows_of(models / "out")[f"{MODULE}.1.up_proj.weight"]
    roles = {"target": "target", "donor": "donor", "both": "target, donor"}[fp8]
    assert row.decoded == f"{roles}: fp8 128×128"
    assert row.matched == f"reference: a part of {GATE_UP}"
    assert row.input_dtypes == ("reference: F16" if fp8 != "target" else "donor: F32; reference: F16")
    assert f"   decoded  {roles}: fp8 128×128 (6 tensors)" in said


def test_a_fused_target_in_fp8_gets_experts_that_are_not(tmp_path: Path) -> None:
    stored, t = fp8_fused(3)
    a, b = split(4, "BF16"), split(5, "BF16")
    found, _ = transferred(write(tmp_path, stored, a, b))
    assert_same(found, {GATE_UP: combined(t, [(fused(a), fused(b))], [ALPHA], "BF16")})


def test_a_fused_target_is_made_of_experts_and_requantized(tmp_path: Path) -> None:
    stored, t = fp8_fused(3)
    a, b = split(4, "BF16"), split(5, "BF16")
    models = write(tmp_path, stored, a, b)
    found, said = transferred(models, "--requantize")
    wanted = quantized(accumulated(t, [(fused(a), fused(b))], [ALPHA]), t.shape)
    assert_same(found, dict(zip(stored, wanted, strict=True)))
    assert "requantized  fp8 128×128 with scales in F32 (1 tensor)" in said


def test_parts_that_end_within_a_block_are_not_requantized(tmp_path: Path) -> None:
    models = write(tmp_path, fp8_fused(3, 96)[0], split(4, "BF16", 96), split(5, "BF16", 96))
    told = ("gets its vector in parts, one of which ends within a block of 128 rows", GATE_UP)
    assert_refused(models, transfer(models, models / "out", "--requantize"), told)
    ok(*transfer(models, models / "out"))


def test_float64_is_not_requantized(tmp_path: Path) -> None:
    stored, _ = fp8_split(3)
    models = write(tmp_path, stored, split(4, "F64"), split(5, "BF16"))
    assert_refused(models, transfer(models, models / "out", "--requantize"), ("F64", "--requantize"))


def test_an_adapter_of_split_projections_is_added_to_a_fused_one(tmp_path: Path) -> None:
    """Query and value have an adapter: the rows of key stay as they are, bit by bit, and the base is not read."""
    at, width = "model.layers.0.self_attn", 70
    heads = {"hidden_size": width, "num_attention_heads": 7, "num_key_value_heads": 2, "head_dim": 10}
    shapes = {"q": (70, width), "k": (20, width), "v": (20, width)}
    rng = np.random.default_rng(6)
    base = {f"{at}.{part}_proj.weight": weights(rng, "BF16", shape) for part, shape in shapes.items()}
    target = weights(rng, "F32", (110, width))
    models = write_models(
        tmp_path,
        {"target": {f"{at}.qkv_proj.weight": target}, "donor": base, "reference": base},
        configs=dict.fromkeys(ROLES, heads),
    )
    factors = {
        part: (weights(rng, "F32", (shapes[part][0], 4)), weights(rng, "BF16", (4, width))) for part in ("q", "v")
    }
    adapter = write_adapter(tmp_path / "adapter", {f"{at}.{part}_proj": pair for part, pair in factors.items()})
    donor = f"{models / 'reference'}+{adapter}"
    inputs = ("--target", models / "target", "--donor", donor, "--reference", models / "reference")
    done = ok("transfer", *inputs, f"--alpha={ALPHA}", "--out", tmp_path / "out", "--runtime", "local")
    ok("verify", tmp_path / "out", "--against-inputs")

    t = widen(target).reshape(target.shape)
    rows = [t[:70] + np.float32(ALPHA) * delta(factors["q"], 2), t[70:90]]
    rows.append(t[90:] + np.float32(ALPHA) * delta(factors["v"], 2))
    wanted = Raw("F32", target.shape, np.concatenate(rows).tobytes())
    assert_same(read_checkpoint(tmp_path / "out"), {f"{at}.qkv_proj.weight": wanted})
    assert rows_of(tmp_path / "out")[f"{at}.qkv_proj.weight"].decoded == "adapter: lora of rank 4"
    assert "as 3 tensors" in done.stdout


def test_a_missing_scale_is_the_only_thing_that_is_told(tmp_path: Path) -> None:
    """The weight itself is there: nobody is sent looking for it under other names."""
    name = next(iter(parts_of(INNER)))
    stored = dict(fp8_split(1)[0])
    del stored[f"{name}_scale_inv"]
    models = write(tmp_path, split(4, "F32"), stored, split(5, "BF16"))
    done = assert_refused(models, transfer(models, models / "out"), (name, "is F8_E4M3 and has no scales"))
    assert "is missing" not in done.stderr
