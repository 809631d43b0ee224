"""Launcher files by Ray's own validation, the script by a linter, and rv's command lines by rv itself."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_files import CLUSTER, documents, rv_commands
from ray.autoscaler._private.util import prepare_config, validate_config

BIN = Path(sys.executable).parent
LAUNCHERS = ("aws", "gcp", "on-premises")
COMMANDS = rv_commands()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_launcher_file(name: str) -> None:
    (config,) = documents(CLUSTER / "launcher" / f"{name}.yaml")
    validate_config(prepare_config(copy.deepcopy(config)))
    starts = [c for kind in ("head", "worker") for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    for command in starts:
        assert "--object-store-memory=104857600" in command
        assert "RAY_AUTH_MODE=disabled" in command + " ".join(config.get("docker", {}).get("run_options", []))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_refuses_a_misspelt_field(name: str) -> None:
    (config,) = documents(CLUSTER / "launcher" / f"{name}.yaml")
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config(config | {"max_workerz": 3}))


def test_sbatch_passes_shellcheck() -> None:
    done = subprocess.run([BIN / "shellcheck", CLUSTER / "slurm" / "rv.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("where", COMMANDS)
def test_rv_knows_the_command(where: str, tmp_path: Path) -> None:
    """rv gets as far as the inputs, which are not there: it parsed every option and every value."""
    name, *arguments = COMMANDS[where]
    assert name == "rv"
    arguments = [re.sub(r"^(/shared|\$models|\$out)", str(tmp_path), argument) for argument in arguments]
    done = subprocess.run([BIN / "rv", *arguments, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such option" not in done.stderr
    assert str(tmp_path) in done.stderr, done.stderr
