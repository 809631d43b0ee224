"""What a command is told at the place of another one's output: in which of their own words the two differ."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from refusal import ROLES, TWO, assert_refused, make_models, run_rv, transfer, tree
from schemas import check

import rv_distributed as rv


def stop(_: rv.Progress) -> None:
    raise KeyboardInterrupt


def stopped(models: Path, out: Path) -> None:
    """A run with alpha 0.7 that is stopped when its only piece is finished."""
    target, donor, reference = (str(models / role) for role in ROLES)
    how = rv.RunOptions(runtime="local")
    with pytest.raises(KeyboardInterrupt):
        rv.transfer(target, donor, reference, str(out), alpha=0.7, run_options=how, progress=stop)


COMMANDS = {
    "alpha": (("--alpha", "0.3"), "alpha: then 0.7, now 0.3"),
    "dtype": (("--alpha", "0.7", "--dtype", "float32"), "--dtype: then auto, now float32"),
    # Which rounds alpha, too.
    "arithmetic": (("--alpha", "0.7", "--compute-dtype", "float64"), "--compute-dtype: then float32, now float64"),
    "both": (("--alpha", "0.3", "--include", "up"), "--include: then not given, now up"),
    "size": (("--alpha", "0.7", "--max-shard-size", "1GB"), "--max-shard-size: then 5000000000, now 1000000000"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_another_command_on_an_unfinished_run(tmp_path: Path, what: str) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    stopped(models, out)
    more, told = COMMANDS[what]
    wanted = f"{out}: an unfinished run was begun with other inputs, options or versions ({told}). Run"
    for how in ("--quiet", "--dry-run"):
        assert_refused(tmp_path, transfer(models, out, *more, how), wanted)
    assert run_rv(*transfer(models, out, *more, "--dry-run", "--restart")).status == 0


RECIPES = {
    "alpha": ("    alpha: [{match: up, alpha: 0.3}, {alpha: 0.1}]\n", "0.3", "0.5", "an alpha"),
    "sweep": ("sweep: {include: {some: up}}\n", "up", "up|embed", "an alpha"),
    "scale": ("operation: task_arithmetic\nscale: [{match: up, alpha: 0.3}, {alpha: 1}]\n", "0.3", "0.5", "scale"),
}
"""What a recipe says of its vector, what changes in it, and what is told to differ by tensor."""


def recipe(models: Path, more: str) -> str:
    vector = f"  - donor: {models / 'donor'}\n    reference: {models / 'reference'}\n"
    (models / "recipe.yaml").write_text(f"target: {models / 'target'}\nvectors:\n{vector}{more}")
    return str(models / "recipe.yaml")


@pytest.mark.parametrize("what", RECIPES)
def test_what_depends_on_the_tensor_is_not_blamed_on_the_inputs(tmp_path: Path, what: str) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    text, then, now, told = RECIPES[what]
    how = rv.RunOptions(runtime="local")
    with pytest.raises(KeyboardInterrupt):
        rv.run(recipe(models, text), str(out), run_options=how, progress=stop)
    where = ("--out", out, "--runtime", "local", "--quiet")
    command: list[str | Path] = ["run", recipe(models, text.replace(then, now)), *where]
    assert_refused(tmp_path, command, f"({told} by tensor, or the small files of an input). Run")
    rv.run(recipe(models, text), str(out), run_options=how)
    recipe(models, text.replace(then, now))
    assert_refused(tmp_path, command, f"({told} by tensor, or other files of an input). Give")
    os.utime(models / "donor" / TWO, (2**32, 2**32))
    assert_refused(tmp_path, command, f"({told} by tensor, or {models / 'donor' / TWO} was written since). Give")


def test_a_dry_run_says_what_the_run_would_keep(tmp_path: Path) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    command = [*transfer(models, out, "--alpha", "0.7"), "--dry-run"]
    resumes = "   resumes  1 of 1 piece is there\n"
    assert resumes not in run_rv(*command).stdout
    stopped(models, out)
    before = tree(tmp_path)
    assert resumes in run_rv(*command).stdout
    assert check("planned", run_rv(*command, "--json").stdout)["pieces_kept"] == 1
    assert resumes not in run_rv(*command, "--restart").stdout
    sweep = transfer(models, tmp_path / "out{alpha}", "--alpha", "0.7,0.5", "--dry-run")
    (tmp_path / ".out.rv").rename(tmp_path / ".out0.7.rv")
    assert resumes not in run_rv(*sweep).stdout
    (tmp_path / ".out0.7.rv").rename(tmp_path / ".out.rv")
    assert tree(tmp_path) == before
    done = run_rv(*command[:-1])
    assert "1 of 1 pieces kept from an earlier run" in done.stdout
    assert resumes not in run_rv(*command).stdout


def test_another_input_on_an_unfinished_run(tmp_path: Path) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    stopped(models, out)
    os.utime(models / "reference" / TWO, (0, 0))
    refused = run_rv(*transfer(models, out, "--quiet", "--alpha", "0.7"))
    assert f"(size or time of {models / 'reference' / TWO} changed, or it was replaced)" in refused.stderr
    (models / "donor").rename(models / "other")
    inputs = ("--target", models / "target", "--donor", models / "other", "--reference", models / "reference")
    refused = run_rv("transfer", *inputs, "--alpha", "0.7", "--out", out, "--runtime", "local", "--quiet")
    assert f"(donor: then {models / 'donor'}, now {models / 'other'})" in refused.stderr


# A finished output


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """The models, and an output of them with alpha 0.7."""
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    assert run_rv(*transfer(models, out, "--alpha", "0.7")).status == 0
    return models, out


def assert_told(models: Path, out: Path, told: str, *more: str) -> None:
    wanted = f"{out}: already exists, {told}. Give another --out, or --overwrite to replace it."
    assert_refused(models, transfer(models, out, *(more or ("--alpha", "0.7"))), wanted)


@pytest.mark.parametrize("what", COMMANDS)
def test_another_command_on_a_finished_output(made: tuple[Path, Path], what: str) -> None:
    more, told = COMMANDS[what]
    assert_told(*made, f"made with other inputs, options or versions ({told})", *more)


def test_a_file_of_an_input_that_was_written_since(made: tuple[Path, Path]) -> None:
    file = made[0] / "reference" / TWO
    os.utime(file, (2**32, 2**32))
    assert_told(*made, f"made with other inputs, options or versions ({file} was written since)")
    os.utime(file, (0, 0))
    assert_told(*made, "made with other inputs, options or versions (other files of an input)")


@pytest.mark.parametrize("created", ["yesterday", "0001-01-01T00:00:00"])
def test_a_manifest_that_tells_no_time(made: tuple[Path, Path], created: str) -> None:
    models, out = made
    manifest = json.loads((out / "rv_manifest.json").read_text())
    (out / "rv_manifest.json").write_text(json.dumps({**manifest, "created": created}))
    os.utime(models / "reference" / TWO, (2**32, 2**32))
    assert_told(*made, "made with other inputs, options or versions (other files of an input)")


def test_another_input_on_a_finished_output(made: tuple[Path, Path]) -> None:
    models, _ = made
    shutil.copyfile(models / "target" / TWO, models / "reference" / TWO)
    told = f"reference: {models / 'reference'} has other weights"
    assert_told(*made, f"made with other inputs, options or versions ({told})")


def test_a_file_of_the_output_that_is_not_as_it_was(made: tuple[Path, Path]) -> None:
    _, out = made
    size = (out / "model.safetensors").stat().st_size
    os.truncate(out / "model.safetensors", size - 1)
    assert_told(*made, f"but its model.safetensors has {size - 1} bytes instead of {size}")
    (out / "model.safetensors").unlink()
    assert_told(*made, "but its model.safetensors is missing")


def test_another_kind_of_output(made: tuple[Path, Path]) -> None:
    models, out = made
    inputs = ("--donor", models / "donor", "--reference", models / "reference")
    done = run_rv("extract", *inputs, "--out", out, "--runtime", "local")
    assert (
        "already exists, made with other inputs, options or versions (operation: then transfer, now extract)"
        in done.stderr
    )
    assert run_rv("extract", *inputs, "--out", models / "vector", "--runtime", "local").status == 0
    done = run_rv("extract", *inputs, "--out", models / "vector", "--runtime", "local", "--include", "up")
    assert "(--include: then not given, now up)" in done.stderr
