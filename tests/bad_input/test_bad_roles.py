"""Models that are given as vectors, and vectors that are given as models: a manifest tells, or nothing does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from refusal import assert_refused, make_models, run_rv, transfer
from safetensors.numpy import load_file
from triples import ok

import rv_distributed as rv


def made(folder: Path) -> Path:
    """Three models, a ``vector`` and a ``model`` that were made of them."""
    models = make_models(folder)
    inputs = ("--donor", models / "donor", "--reference", models / "reference")
    ok("extract", *inputs, "--out", models / "vector", "--runtime", "local")
    ok(*transfer(models, models / "model"))
    return models


def test_a_model_as_a_vector_is_refused(tmp_path: Path) -> None:
    models = made(tmp_path)
    args: list[str | Path] = [
        "apply",
        "--target",
        models / "target",
        "--vector",
        models / "model",
        "--out",
        models / "out",
    ]
    told = f"{models / 'model'}: is given as the vector, but its rv_manifest.json says that it is a model, made by "
    assert_refused(models, args, (f"{told}transfer. ", "the model as --donor with its --reference to rv transfer"))


@pytest.mark.parametrize(
    ("role", "remedy"),
    [("target", "Give a model as --target"), ("donor", "as --vector to rv apply"), ("reference", "as --reference")],
)
def test_a_vector_as_a_model_is_refused(tmp_path: Path, role: str, remedy: str) -> None:
    models = made(tmp_path)
    (models / role).rename(models / "other")
    (models / "vector").rename(models / role)
    told = f"{models / role}: is given as the {role}, but its rv_manifest.json says that it is a vector, made by "
    assert_refused(models, transfer(models, models / "out"), (f"{told}extract. ", remedy))


@pytest.mark.parametrize("manifest", [None, b"{}", b'{"operation": ["extract"]}', b'{"operation": "linear"}'])
def test_a_vector_that_nothing_says_to_be_one_is_warned_of(tmp_path: Path, manifest: bytes | None) -> None:
    models = make_models(tmp_path)
    if manifest is not None:
        (models / "donor" / "rv_manifest.json").write_bytes(manifest)
    args: list[str | Path] = [
        "apply",
        "--target",
        models / "target",
        "--vector",
        models / "donor",
        "--out",
        models / "out",
        "--dry-run",
    ]
    warning = f"{models / 'donor'}: nothing says that it is a vector: if it is a model, all of its weights are added"
    done = run_rv(*args)
    assert (done.status, done.stderr) == (0, f"warning: {warning}\n")
    assert json.loads(run_rv(*args, "--json").stdout)["plan"]["warnings"] == [warning]


def test_a_vector_that_no_output_gets_may_be_anything(tmp_path: Path) -> None:
    models = made(tmp_path)
    vectors = ("--vector", f"{models / 'vector'}=0.5", "--vector", f"{models / 'model'}=0")
    done = ok("apply", "--target", models / "target", *vectors, "--out", models / "out", "--runtime", "local")
    assert done.stderr == ""


def test_a_vector_is_added_to_another_as_the_refusal_says(tmp_path: Path) -> None:
    models = made(tmp_path)
    one, other, total = models / "vector", models / "other", models / "sum"
    ok("extract", "--donor", models / "target", "--reference", models / "donor", "--out", other, "--runtime", "local")
    args: list[str | Path] = ["apply", "--target", one, "--vector", f"{other}=0.5", "--out", total]
    told = "to add vectors up, write a recipe for rv run, with `model:` for each of them and no `target:`."
    assert_refused(models, args, (f"{one}: is given as the target", told))
    (models / "sum.yaml").write_text("vectors: [{model: vector}, {model: other, alpha: 0.5}]")
    ok("run", models / "sum.yaml", "--out", total, "--runtime", "local")
    v, w, both = (load_file(folder / "model.safetensors") for folder in (one, other, total))
    for name, values in both.items():
        np.testing.assert_allclose(values, v[name] + np.float32(0.5) * w[name], rtol=1e-5, atol=1e-7)


def test_vectors_may_be_summed(tmp_path: Path) -> None:
    models = made(tmp_path)
    recipe = rv.Recipe("linear", None, (rv.Vector(str(models / "vector")),), ((0.5,),))
    job = rv.prepare(recipe, [str(models / "out")], rv.PlanOptions(), rv.RunOptions(runtime="local"))
    assert job.warnings == ()
