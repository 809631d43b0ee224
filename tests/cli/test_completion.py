"""Completion of commands and options in each shell that typer knows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RV = str(Path(sys.executable).parent / "rv")


def completed(shell: str, words: str) -> str:
    """What the completion script of a shell asks rv for, and gets."""
    env = {**os.environ, "_RV_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": words, "COMP_WORDS": words}
    env |= {
        "COMP_CWORD": str(len(words.split()) - (0 if words.endswith(" ") else 1)),
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run([RV], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(shell: str) -> None:
    assert "transfer" in completed(shell, "rv tra")
    assert "verify" not in completed(shell, "rv tra")
    assert "--rounding" in completed(shell, "rv transfer --rou")
    assert "stochastic" in completed(shell, "rv transfer --rounding sto")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_takes_the_script() -> None:
    env = {**os.environ, "_RV_COMPLETE": "source_bash"}
    script = subprocess.run([RV], env=env, capture_output=True, text=True, timeout=60, check=True).stdout
    words = 'COMP_WORDS=(rv diff --par); COMP_CWORD=2; _rv_completion; echo "${COMPREPLY[@]}"'
    env["PATH"] = f"{Path(RV).parent}{os.pathsep}{os.environ['PATH']}"
    shell = ["bash", "--norc", "-c", f"{script}\nCOMP_LINE=x\n{words.replace('_rv_completion', '_rv_completion rv')}"]
    done = subprocess.run(shell, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["--parquet"]
