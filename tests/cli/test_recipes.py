"""`rv run`, `rv recipe`, sweeps and environment variables, through the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from reference import combined, read_checkpoint, widen
from refusal import make_models, run_rv, transfer, tree

from rv_distributed.cli.app import app
from rv_distributed.cli.recipe import STARTER
from rv_distributed.recipe_files.reading import load_recipe

LOCAL = ("--runtime", "local")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return make_models(tmp_path / "models", shards=1)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_makes_what_the_flags_make(models: Path, tmp_path: Path) -> None:
    text = "target: target\nvectors:\n- donor: ${RV_T_DONOR:-donor}\n  reference: ./reference\n  alpha: 0.7\n"
    done = run_rv("run", write(models, text), "--out", tmp_path / "one", *LOCAL)
    assert done.status == 0, done.stderr
    assert "transfer: O = T + 0.7·(A − B)" in done.stdout
    assert run_rv(*transfer(models, tmp_path / "other", "--alpha", "0.7")).status == 0
    for name in ("model.safetensors", "rv_recipe.yaml", "rv_tensors.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    again = run_rv("run", tmp_path / "one" / "rv_recipe.yaml", "--out", tmp_path / "one", *LOCAL)
    assert (again.status, "up to date" in again.stdout) == (0, True)
    assert run_rv("verify", tmp_path / "one", "--against-inputs").status == 0


@pytest.mark.parametrize("command", ["extract", "apply", "transfer"])
def test_what_any_command_made_can_be_made_again(models: Path, tmp_path: Path, command: str) -> None:
    inputs = {
        "extract": ("--donor", models / "donor", "--reference", models / "reference", "--include", "layers"),
        "apply": ("--target", models / "target", "--vector", models / "donor=0.3", "--dtype", "float32"),
        "transfer": (
            *transfer(models, tmp_path / "one")[1:-4],
            *("--alpha", "1e-1", "--rounding", "stochastic", "--seed", "5"),
            *("--max-shard-size", "100B", "--stats", "basic"),
        ),
    }
    assert run_rv(command, *inputs[command], "--out", tmp_path / "one", *LOCAL).status == 0
    done = run_rv("run", tmp_path / "one" / "rv_recipe.yaml", "--out", tmp_path / "two", *LOCAL)
    assert done.status == 0, done.stderr
    timed = {"rv_manifest.json", "rv_pieces.parquet", "README.md"}
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    for name in set(tree(tmp_path / "one")) - timed:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    listed = json.loads((tmp_path / "one" / "rv_manifest.json").read_bytes())["files"]
    assert "rv_recipe.yaml" in {file["name"] for file in listed}


def test_alphas_by_tensor_are_those_of_the_recipe(models: Path, tmp_path: Path) -> None:
    text = """
target: target
vectors:
- donor: donor
  reference: reference
  alpha:
  - {match: 'layers', alpha: [0.25, 1]}
  - {match: norm, alpha: -0.5}
"""
    done = run_rv("run", write(models, text), "--out", tmp_path / "out", *LOCAL)
    assert done.status == 0, done.stderr
    assert "O = T + α1·(A − B)" in done.stdout
    assert f"output  {tmp_path}/out  (α1 0.25→1 over the layers for layers, -0.5 for norm)" in done.stdout
    target, donor, reference = (read_checkpoint(models / role) for role in ("target", "donor", "reference"))
    alphas = {"embed": 0.0, "layers.0.up": 0.25, "layers.1.up": 1.0, "norm": -0.5}
    found = read_checkpoint(tmp_path / "out")
    for name, alpha in alphas.items():
        assert found[name].data == combined(target[name], [(donor[name], reference[name])], [alpha]).data, name
    manifest = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())
    assert (manifest["alphas"], manifest["totals"]["combined"], manifest["totals"]["copied"]) == ([None], 3, 1)
    assert run_rv("verify", tmp_path / "out", "--against-inputs").status == 0
    assert run_rv("report", tmp_path / "out", "--format", "md", "--out", "-").status == 0
    assert run_rv("inspect", tmp_path / "out").status == 0


def test_a_sum_of_models_has_the_files_of_its_base_and_none_of_its_values(models: Path, tmp_path: Path) -> None:
    (models / "target" / "config.json").write_text((models / "target" / "config.json").read_text() + "\n")
    text = "base: target\nvectors: [{model: donor, alpha: 0.5}, {model: reference, alpha: 0.5}]\ndtype: float32\n"
    done = run_rv("run", write(models, text), "--out", tmp_path / "out", *LOCAL)
    assert done.status == 0, done.stderr
    assert "linear: O = 0.5·M1 + 0.5·M2" in done.stdout
    donor, reference, found = (
        read_checkpoint(path) for path in (models / "donor", models / "reference", tmp_path / "out")
    )
    for name, raw in found.items():
        assert raw.data == (np.float32(0.5) * widen(donor[name]) + np.float32(0.5) * widen(reference[name])).tobytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == (models / "target" / "config.json").read_bytes()
    assert run_rv("verify", tmp_path / "out", "--against-inputs").status == 0


def test_a_sweep_makes_outputs_that_stand_alone(models: Path, tmp_path: Path) -> None:
    text = """
target: target
vectors: [{donor: donor, reference: reference}]
sweep: {alpha: [0.5, 1], include: {layers: layers, norm: norm}}
"""
    recipe = write(models, text)
    refused = run_rv("run", recipe, "--out", tmp_path / "out-{alpha}", *LOCAL)
    assert (refused.status, "out-{alpha}-{include}" in refused.stderr) == (2, True)
    done = run_rv("run", recipe, "--out", tmp_path / "out-{alpha}-{include}", *LOCAL)
    assert done.status == 0, done.stderr
    assert done.stdout.count("O = T + α1·(A − B)") == 1
    assert "tensors  3 computed, 1 copied in one output or another" in done.stdout
    assert f"{tmp_path}/out-0.5-layers  (α1 0.5 for layers; 2 computed, 2 copied)" in done.stdout
    assert f"{tmp_path}/out-1-norm  (α1 1 for norm; 1 computed, 3 copied)" in done.stdout
    for alpha in ("0.5", "1"):
        for name in ("layers", "norm"):
            out = tmp_path / f"out-{alpha}-{name}"
            assert run_rv("verify", out, "--against-inputs").status == 0
            alone = tmp_path / f"alone-{alpha}-{name}"
            assert run_rv(*transfer(models, alone, "--alpha", alpha, "--include", name)).status == 0
            assert (alone / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
            again = run_rv("run", out / "rv_recipe.yaml", "--out", out, *LOCAL)
            assert (again.status, "up to date" in again.stdout) == (0, True)


def test_alphas_are_given_with_commas_or_again(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out-{alpha}"
    done = run_rv(*transfer(models, out, "--alpha", "0.25,0.5", "--alpha", "0.75", "--json"))
    assert [Path(output["path"]).name for output in json.loads(done.stdout)["outputs"]] == [
        "out-0.25",
        "out-0.5",
        "out-0.75",
    ]
    more = json.loads(run_rv(*transfer(models, out, "--alpha", "0.5", "--alpha", "1", "--json")).stdout)["outputs"]
    assert [output["up_to_date"] for output in more] == [True, False]


def test_problems_of_a_recipe_are_a_document_too(models: Path, tmp_path: Path) -> None:
    recipe = write(models, "target: t\nvectors: [{vector: a, wait: 1}]\nseed: x\n")
    for command in (("run", recipe, "--out", tmp_path / "out"), ("recipe", "check", recipe)):
        done = run_rv(*command, "--json")
        assert done.status == 2
        assert [problem["where"] for problem in json.loads(done.stdout)["problems"]] == [f"{recipe}:2", f"{recipe}:3"]


def test_init_writes_a_recipe_that_can_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    assert run_rv("recipe", "init", path).status == 0
    assert path.read_text() == STARTER
    assert run_rv("recipe", "init").stdout == STARTER
    shown = run_rv("recipe", "check", path)
    assert (shown.status, shown.stdout.splitlines()[0]) == (0, "transfer, 3 outputs")
    assert run_rv("recipe", "init", path).status == 2
    # What is commented out is right as well.
    lines = [line.replace("# ", "", 1) if line.startswith("  # ") else line for line in STARTER.splitlines()]
    path.write_text("\n".join(lines))
    loaded = load_recipe(path)
    assert (len(loaded.recipe.vectors), len(loaded.labels)) == (4, 6)


@pytest.mark.parametrize("through", ["RV_TRANSFER_ALPHA", "RV_DTYPE", "RV_JSON", "RV_OVERWRITE"])
def test_options_are_read_from_the_environment(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    values = {"RV_TRANSFER_ALPHA": "0.25", "RV_DTYPE": "float32", "RV_JSON": "1", "RV_OVERWRITE": "true"}
    monkeypatch.setenv("RV_RUNTIME", "local")
    monkeypatch.setenv(through, values[through])
    if through == "RV_OVERWRITE":
        assert run_rv(*transfer(models, tmp_path / "out", "--alpha", "2")).status == 0
    done = run_rv(*transfer(models, tmp_path / "out"))
    assert done.status == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())
    assert manifest["alphas"] == [0.25 if through == "RV_TRANSFER_ALPHA" else 1.0]
    assert manifest["options"]["dtype"] == ("float32" if through == "RV_DTYPE" else "auto")
    assert done.stdout.startswith("{") == (through == "RV_JSON")
    if through == "RV_JSON":
        assert json.loads(run_rv("transfer", "--no-such-option").stdout)["status"] == "error"


def options_of(command: Any, prefix: str | None) -> Iterator[tuple[str, Any, str | None]]:
    """Every option of a command and of those below it, with the prefix of the variables that click makes."""
    prefix = command.context_settings.get("auto_envvar_prefix", prefix)
    for parameter in command.params:
        if parameter.param_type_name == "option":
            yield command.name, parameter, prefix
    for below in getattr(command, "commands", {}).values():
        yield from options_of(below, prefix)


def test_every_option_of_every_command_has_a_variable_of_its_own() -> None:
    found: dict[str, set[str]] = {}
    for command, option, prefix in options_of(typer.main.get_command(app), None):
        if option.name in ("shown", "install_completion", "show_completion"):
            continue  # they are no part of any work
        named = option.envvar or (f"{prefix}_{option.name.upper()}" if prefix else None)
        assert named, (command, option.name)
        assert option.help, (command, option.name)
        for name in [named] if isinstance(named, str) else named:
            found.setdefault(name, set()).add(option.name)
    assert all(len(names) == 1 for name, names in found.items()), found
    assert {"RV_DIFF_PARQUET", "RV_APPLY_VECTOR", "RV_RUN_OUT", "RV_REPORT_FORM", "RV_SUBMIT_ADDRESS"} <= found.keys()


def test_the_variables_are_in_the_help() -> None:
    shown = " ".join(run_rv("transfer", "--help").stdout.split())
    for name in ("RV_TRANSFER_TARGET", "RV_TRANSFER_OUT", "RV_WORKERS", "RV_LOG_FORMAT", "RV_JSON"):
        assert name in shown
    assert "RV_SUBMIT_ADDRESS" in run_rv("submit", "--help").stdout
