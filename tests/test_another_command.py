"""What a command is told at the place of another one's output: in which of their own words the two differ."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from refusal import ROLES, TWO, make_models, run_rv, transfer

import rv_distributed as rv


def stopped(models: Path, out: Path) -> None:
    """A run with alpha 0.7 that is stopped when its only piece is finished."""

    def stop(_: rv.Progress) -> None:
        raise KeyboardInterrupt

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
    refused = run_rv(*transfer(models, out, "--quiet", *more))
    assert refused.status == 2
    assert f"{out}: an unfinished run was begun with other inputs, options or versions ({told}). Run" in refused.stderr


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
