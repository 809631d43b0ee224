"""What a run says of its outputs at the end: alpha and what was realised of it, with a remedy where they part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reference import Raw, narrow, weights, widen, write_checkpoint
from refusal import ROLES, run_rv, transfer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fifth of the donor's weights are one unit in the last place away from the reference's."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(5)
    target, reference = ({"x": weights(rng, "BF16", (300, 1000))} for _ in range(2))
    bits = np.frombuffer(reference["x"].data, np.uint16)
    donor = {"x": Raw("BF16", (300, 1000), (bits + (rng.random(bits.size) < 0.2)).astype(np.uint16).tobytes())}
    for role, tensors in zip(ROLES, (target, donor, reference), strict=True):
        write_checkpoint(folder / role, tensors, sidecars={"config.json": b"{}"})
    return folder


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ((), "--rounding stochastic realises it on average; --dtype float32 keeps it"),
        (("--rounding", "stochastic"), None),
        (("--dtype", "float32"), None),
        (("--stats", "basic"), None),
    ],
    ids=str,
)
def test_an_alpha_that_rounding_did_not_realise_is_told_with_the_remedy(
    models: Path, tmp_path: Path, more: tuple[str, ...], warned: str | None
) -> None:
    done = run_rv(*transfer(models, tmp_path / "out", "--alpha", "0.3", *more))
    assert done.status == 0, done.stderr
    totals = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())["totals"]
    if "basic" in more:
        assert totals["realised_alpha"] is None
        assert "realised" not in done.stdout + done.stderr
        return
    assert f"alpha 0.3 realised as {totals['realised_alpha']:.4g}" in done.stdout
    if warned is None:
        assert totals["realised_alpha"] == pytest.approx(0.3, rel=0.02)
        assert "warning" not in done.stderr
    else:
        assert abs(totals["realised_alpha"] - 0.3) > 0.015
        assert f"made of alpha 0.3 a realised alpha of {totals['realised_alpha']:.4g}. {warned}." in done.stderr


def test_the_warning_stands_in_the_json_too(models: Path, tmp_path: Path) -> None:
    done = run_rv(*transfer(models, tmp_path / "out", "--alpha", "0.3", "--json"))
    (warning,) = json.loads(done.stdout)["warnings"]
    assert "rounding made of alpha 0.3" in warning


def test_without_statistics_nothing_is_said_and_the_weights_are_the_same(models: Path, tmp_path: Path) -> None:
    done = run_rv(*transfer(models, tmp_path / "none", "--alpha", "0.3", "--stats", "none"))
    assert "nothing was measured (--stats none)" in done.stdout
    assert "‖v‖" not in done.stdout
    assert run_rv(*transfer(models, tmp_path / "full", "--alpha", "0.3")).status == 0
    files = [tmp_path / name / "model.safetensors" for name in ("none", "full")]
    assert files[0].read_bytes() == files[1].read_bytes()
    totals = json.loads((tmp_path / "none" / "rv_manifest.json").read_bytes())["totals"]
    assert totals["v_norm"] is totals["v_max"] is totals["realised_alpha"] is None
    assert run_rv("verify", tmp_path / "none", "--against-inputs").status == 0


def test_of_several_vectors_it_is_their_sum_that_was_realised(models: Path, tmp_path: Path) -> None:
    for number, role in enumerate(("donor", "target")):
        pair = ("--donor", models / role, "--reference", models / "reference", "--out", tmp_path / f"v{number}")
        assert run_rv("extract", *pair).status == 0
    vectors = ("--vector", f"{tmp_path / 'v0'}=0.3", "--vector", f"{tmp_path / 'v1'}=0.5")
    done = run_rv("apply", "--target", models / "target", *vectors, "--out", tmp_path / "out")
    totals = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())["totals"]
    assert totals["alpha"] == 1
    assert f"the vectors' weighted sum, of alpha 1, realised as {totals['realised_alpha']:.4g}" in done.stdout
    assert totals["realised_alpha"] == pytest.approx(1, rel=0.01)


def test_a_vector_of_alpha_0_beside_another_changes_nothing_that_is_said(models: Path, tmp_path: Path) -> None:
    pair = ("--donor", models / "donor", "--reference", models / "reference")
    run_rv("extract", *pair, "--out", tmp_path / "v0")
    shutil.copytree(tmp_path / "v0", tmp_path / "v2")
    vectors = ("--vector", f"{tmp_path / 'v0'}=0.5", "--vector", f"{tmp_path / 'v2'}=0")
    done = run_rv("apply", "--target", models / "target", *vectors, "--out", tmp_path / "out", "--dtype", "float32")
    totals = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())["totals"]
    assert done.status == 0, done.stderr
    assert done.stderr.count("warning") == 0
    assert (totals["alpha"], totals["realised_alpha"]) == (1, pytest.approx(1, rel=1e-4))
    alone = run_rv(
        "apply", "--target", models / "target", "--vector", f"{tmp_path / 'v0'}=0.5", "--out", tmp_path / "one"
    )
    assert alone.status == 0
    one = json.loads((tmp_path / "one" / "rv_manifest.json").read_bytes())["totals"]
    assert totals["v_norm"] == pytest.approx(0.5 * one["v_norm"], rel=1e-6)


def test_statistics_of_another_kind_are_another_run(models: Path, tmp_path: Path) -> None:
    assert run_rv(*transfer(models, tmp_path / "out", "--stats", "basic")).status == 0
    again = run_rv(*transfer(models, tmp_path / "out"))
    assert again.status == 2
    assert "already exists" in again.stderr
    assert run_rv(*transfer(models, tmp_path / "out", "--stats", "some")).status == 2


def test_the_example_s_numbers_are_those_of_its_definition(models: Path, tmp_path: Path) -> None:
    assert run_rv(*transfer(models, tmp_path / "out", "--alpha", "0.7")).status == 0
    raws = [Raw("BF16", (1,), (models / role / "model.safetensors").read_bytes()[-600_000:]) for role in ROLES]
    t, a, b = (widen(raw).astype(np.float64) for raw in raws)
    o = widen(Raw("BF16", (1,), (tmp_path / "out" / "model.safetensors").read_bytes()[-600_000:])).astype(np.float64)
    v, alpha = a - b, float(np.float32(0.7))
    assert narrow((t + alpha * v).astype(np.float32), "BF16") == narrow(o.astype(np.float32), "BF16")
    totals = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())["totals"]
    assert totals["realised_alpha"] == pytest.approx(np.dot(o - t, v) / np.dot(v, v), rel=1e-12)
    assert totals["relative_error"] == pytest.approx(np.linalg.norm(o - t - alpha * v) / (alpha * np.linalg.norm(v)))
    assert totals["cosine"] == pytest.approx(np.dot(v, t) / np.linalg.norm(v) / np.linalg.norm(t))
    assert totals["absorbed_elements"] == np.count_nonzero((o == t) & (v != 0))


def test_where_tensors_have_alphas_of_their_own_their_mean_is_told_in_few_digits(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    for role in ROLES:
        write_checkpoint(tmp_path / role, {name: weights(rng, "F32", (64, 64)) for name in ("a", "b", "c")})
    recipe = tmp_path / "recipe.yaml"
    choices = "[{match: a, alpha: 0.1}, {match: b, alpha: 0.2}, {alpha: 0.7}]"
    recipe.write_text(f"target: target\nvectors: [{{donor: donor, reference: reference, alpha: {choices}}}]\n")
    done = run_rv("run", str(recipe), "--out", str(tmp_path / "out"))
    assert done.status == 0, done.stderr
    totals = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())["totals"]
    assert 0.1 < totals["alpha"] < 0.7
    assert f"a mean alpha of {totals['alpha']:.4g} realised as {totals['alpha']:.4g}" in done.stdout
