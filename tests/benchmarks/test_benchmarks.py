"""The benchmark suite works: a toy run measures every row, and what its commands wrote verifies."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rv_distributed.runtime.select import may_have_gpus

SUITE = Path(__file__).parent
#: Rows whose commands of ours leave outputs; `plan`, `large` and `help` write none, and `scaling` stops before it has.
WRITING = {
    "steady-warm",
    "steady-cold",
    "apply",
    "statistics",
    "stochastic",
    "alphas",
    "memory-toy",
    "memory-one-tensor-8388608",
    "scheduling",
    "wire",
    *(("gpu", "gpu-float64") if may_have_gpus() else ()),
}


@pytest.mark.timeout(600)
def test_a_toy_suite_measures_every_row_and_its_outputs_verify(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--size", "toy", "--work", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr

    results = json.loads((tmp_path / "results.json").read_text())
    assert {figure["row"] for figure in results["figures"]} == WRITING | {"plan", "help", "memory", "scaling", "large"}
    for figure in results["figures"]:
        assert math.isfinite(figure["value"]), figure
        assert all(math.isfinite(value) for side in figure["raw"].values() for value in side), figure
    assert set(results["verified"]) == WRITING
    assert results["verified"].count("alphas") == 4
    assert ended.stdout == (tmp_path / "results.md").read_text()
    assert ended.stdout.count("\n") == 2 + len(results["figures"])


def test_the_speed_of_chunks_is_printed() -> None:
    command = [sys.executable, str(SUITE / "chunks.py"), "--elements", "300000", "--repeats", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stdout.splitlines() if line.startswith("cpu, ")]
    assert len(lines) == 6
    assert all(float(line.rpartition(": ")[2].removesuffix(" GB/s")) > 0 for line in lines)
