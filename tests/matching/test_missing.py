"""Tensors that not all inputs have: what is copied, what is listed, and what stops a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from reference import Raw, assert_same, combined, read_checkpoint, weights
from refusal import ROLES, assert_refused, transfer
from triples import ALPHA, ok, rows_of, transferred, write_models

COMMON = ("model.layers.0.up.weight", "model.norm.weight")
VISION = ("model.visual.blocks.0.weight", "model.visual.blocks.1.weight")
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
MTP = "model.layers.61.eh_proj.weight"


def models_of(
    folder: Path, *, target: Sequence[str] = (), donor: Sequence[str] = (), reference: Sequence[str] = ()
) -> Path:
    """Models with `COMMON` tensors, and of each role the ones that are named."""
    rng = np.random.default_rng(23)
    more = {"target": target, "donor": donor, "reference": reference}
    tensors = {role: {name: weights(rng, "BF16", (40,)) for name in (*COMMON, *more[role])} for role in ROLES}
    return write_models(folder, tensors, shards=1)


def wanted(models: Path) -> dict[str, Raw]:
    """The target with the vector in all that three have."""
    t, a, b = (read_checkpoint(models / role) for role in ROLES)
    return {
        name: combined(t[name], [(a[name], b[name])], [ALPHA]) if name in a.keys() & b.keys() else t[name] for name in t
    }


def left_out(models: Path) -> dict[str, str]:
    manifest = json.loads((models / "out" / "rv_manifest.json").read_bytes())
    return {entry["tensor"]: entry["why"] for entry in manifest["left_out"]}


def test_what_only_the_target_has_is_copied_and_counted(tmp_path: Path) -> None:
    models = models_of(tmp_path, target=VISION)
    found, said = transferred(models)
    assert_same(found, wanted(models))
    assert "2 computed, 2 copied (2 not in any vector)" in said
    assert "not computed: model.visual.blocks.0.weight, model.visual.blocks.1.weight" in said


def test_what_the_target_has_not_is_listed(tmp_path: Path) -> None:
    models = models_of(tmp_path, donor=(MTP,), reference=(MTP, *VISION))
    found, said = transferred(models)
    assert_same(found, wanted(models))
    assert left_out(models) == {MTP: f"only in {models / 'donor'}"} | dict.fromkeys(
        VISION, f"only in {models / 'reference'}"
    )
    assert f"left out  3 tensors with no place in the output: {MTP}, " in said


@pytest.mark.parametrize(("lacks", "has"), [("donor", "reference"), ("reference", "donor")])
def test_what_one_side_lacks_is_an_error_unless_it_may_be_copied(tmp_path: Path, lacks: str, has: str) -> None:
    sides = {"target": VISION, has: VISION}
    models = models_of(tmp_path, **sides)
    told = f"{models / lacks}: tensor '{VISION[1]}': is missing, but the target and the {has} have it. "
    assert_refused(models, transfer(models, models / "out"), (told, "--key-mapping", "--missing copy"))
    found, said = transferred(models, "--missing", "copy")
    assert_same(found, wanted(models))
    assert f"2 computed, 2 copied (2 not in the {lacks})" in said
    assert {rows_of(models / "out")[name].why for name in VISION} == {f"not in the {lacks}"}
    ok(*transfer(models, models / "excluded", "--exclude", "visual"))


BUFFERS = (
    BUFFER,
    "rotary_emb.inv_freq",
    "model.rotary_emb.cos_cached",
    "model.rotary_emb.sin_cached",
    "encoder.rotary_pos_emb.inv_freq",
    "rope.freqs",
    "h.0.attn.masked_bias",
    "model.embeddings.position_ids",
)


@pytest.mark.parametrize("lacks", ["donor", "reference"])
def test_known_buffers_are_copied_where_one_side_lacks_them(tmp_path: Path, lacks: str) -> None:
    has = "reference" if lacks == "donor" else "donor"
    sides = {"target": BUFFERS, has: BUFFERS}
    models = models_of(tmp_path, **sides)
    found, said = transferred(models)
    assert_same(found, wanted(models))
    assert f"copied (8 not in the {lacks})" in said


@pytest.mark.parametrize("name", ["model.inv_freq", "rotary_emb.inv_freq.weight", "xrotary_emb.inv_freq", "attn.bias"])
def test_a_name_that_is_only_like_a_buffer_s_is_not_one(tmp_path: Path, name: str) -> None:
    models = models_of(tmp_path, target=[name], donor=[name])
    assert_refused(models, transfer(models, models / "out"), f"tensor '{name}': is missing, but the target and")


def test_strangers_on_both_sides_may_be_the_same_and_stop_a_run(tmp_path: Path) -> None:
    models = models_of(tmp_path, target=VISION, donor=("x.0", "x.1", "y"), reference=("x.0", "x.1"))
    told = (
        f"{models / 'target'}: has 2 tensors such as '{VISION[0]}' that no vector has, and {models / 'donor'} has 3 "
        "tensors such as 'x.0' with no place here. "
    )
    assert_refused(models, transfer(models, models / "out"), (told, "--key-mapping", "--missing copy"))
    found, _ = transferred(models, "--missing", "copy")
    assert_same(found, wanted(models))
    assert left_out(models).keys() == {"x.0", "x.1", "y"}


@pytest.mark.parametrize(
    ("target", "donor", "reference"),
    [
        pytest.param(VISION, ("x",), (), id="only one side has strangers: they are no difference"),
        pytest.param(VISION, (BUFFER,), (BUFFER,), id="a known buffer is no stranger"),
        pytest.param((BUFFER,), ("x",), ("x",), id="a known buffer is not missed"),
        pytest.param((), ("x",), ("x",), id="the target has none"),
    ],
)
def test_what_cannot_be_the_same_does_not_stop_a_run(
    tmp_path: Path, target: Sequence[str], donor: Sequence[str], reference: Sequence[str]
) -> None:
    models = models_of(tmp_path, target=target, donor=donor, reference=reference)
    assert_same(transferred(models)[0], wanted(models))


def test_extract_leaves_out_what_the_reference_lacks_and_stops_at_strangers(tmp_path: Path) -> None:
    models = models_of(tmp_path, donor=(MTP,))
    inputs = ("extract", "--donor", models / "donor", "--reference", models / "reference", "--runtime", "local")
    ok(*inputs, "--out", models / "out")
    assert read_checkpoint(models / "out").keys() == set(COMMON)
    assert left_out(models) == {MTP: "not in the reference"}
    strangers = models_of(tmp_path / "strangers", donor=("x",), reference=("y",))
    inputs = ("extract", "--donor", strangers / "donor", "--reference", strangers / "reference", "--runtime", "local")
    told = f"{strangers / 'donor'}: has 1 tensor such as 'x' that no vector has, and {strangers / 'reference'} has 1"
    assert_refused(strangers, [*inputs, "--out", strangers / "out"], told)
    ok(*inputs, "--out", strangers / "out", "--missing", "copy")
    assert left_out(strangers) == {"x": "not in the reference", "y": f"only in {strangers / 'reference'}"}


def test_a_vector_of_few_tensors_is_added_to_what_it_has(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    inputs = ("--donor", models / "donor", "--reference", models / "reference", "--runtime", "local")
    ok("extract", *inputs, "--out", models / "vector", "--include", "norm")
    ok("apply", "--target", models / "target", "--vector", models / "vector", "--out", models / "out")
    found, target = read_checkpoint(models / "out"), read_checkpoint(models / "target")
    assert [name for name in found if found[name] != target[name]] == ["model.norm.weight"]
