"""Runs ``rv`` inside the test process, and holds every refusal against what it owes the user."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from reference import Raw, weights, write_checkpoint

from rv_distributed.cli import main

ROLES = ("target", "donor", "reference")
CONFIG = b'{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 16}'
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SHAPES = {"embed": (16, 8), "layers.0.up": (8, 8), "layers.1.up": (8, 8), "norm": (8,)}


class Done(NamedTuple):
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


def run_rv(*args: str | Path) -> Done:
    """``rv ARGS``, through the console script's own function."""
    argv = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    sys.argv = ["rv", *map(str, args)]
    try:
        stdout, stderr = io.StringIO(), io.StringIO()
        # This process is not to end as that of a run that failed does.
        with (
            patch("os._exit", sys.exit),
            redirect_stdout(stdout),
            redirect_stderr(stderr),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, stdout.getvalue(), stderr.getvalue())
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


def transfer(models: Path, out: Path, *more: str) -> list[str | Path]:
    """The arguments of a transfer between the three models of a folder."""
    inputs: list[str | Path] = [text for role in ROLES for text in (f"--{role}", models / role)]
    return ["transfer", *inputs, "--out", out, "--runtime", "local", *more]


def make_models(folder: Path, *, shards: int = 2) -> Path:
    """``target``, ``donor`` and ``reference``, in two shards with an index and a config."""
    for number, role in enumerate(ROLES):
        rng = np.random.default_rng(number)
        tensors = {name: weights(rng, "BF16", shape) for name, shape in SHAPES.items()}
        write_checkpoint(folder / role, tensors, shards=shards, sidecars={"config.json": CONFIG})
    return folder


def one_tensor(folder: Path, name: str = "norm", dtype: str = "BF16", **sidecars: bytes) -> str:
    """A checkpoint of one tensor of ones."""
    data = {"BF16": b"\x80\x3f", "F32": b"\0\0\x80\x3f"}.get(dtype, b"\x01") * 8
    files = {name.replace("_json", ".json"): content for name, content in sidecars.items()}
    return write_checkpoint(folder, {name: Raw(dtype, (8,), data)}, sidecars=files)


def tree(folder: Path) -> list[str]:
    """Every file and folder below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def assert_refused(models: Path, args: list[str | Path], *told: str | tuple[str, ...]) -> Done:
    """Exit status 2, everything ``told`` (the parts of a tuple in one line), no traceback, and no file or folder
    made anywhere among the models."""
    before = tree(models)
    done = run_rv(*args)
    assert (done.status, done.stdout) == (2, ""), done
    for wanted in told:
        parts = (wanted,) if isinstance(wanted, str) else wanted
        lines = [done.stderr] if isinstance(wanted, str) else done.stderr.splitlines()
        assert any(all(part in line for part in parts) for line in lines), f"{wanted!r} is not in {done.stderr!r}"
    assert "Traceback" not in done.stderr
    assert tree(models) == before
    return done


Spoil = Callable[[Path], object]
"""What is done to a checkpoint's folder."""
