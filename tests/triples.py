"""Target, donor and reference that do not quite fit, and what becomes of them: for the tests of matching."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reference import Raw, Tensors, read_checkpoint, write_checkpoint
from refusal import ROLES, Done, run_rv, transfer

from rv_distributed.checkpoint.table import TensorRow, read_table

ALPHA = 0.7
CONFIG: dict[str, Any] = {"model_type": "llama", "num_hidden_layers": 1}


def write_models(
    folder: Path,
    tensors: Mapping[str, Tensors],
    *,
    shards: int = 2,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    sidecars: Mapping[str, Mapping[str, bytes]] | None = None,
) -> Path:
    """The three models of a folder, by their roles; ``configs`` go on top of `CONFIG`."""
    for role in ROLES:
        config = json.dumps({**CONFIG, **(configs or {}).get(role, {})}).encode()
        files = {"config.json": config, **(sidecars or {}).get(role, {})}
        write_checkpoint(folder / role, tensors[role], shards=min(shards, len(tensors[role])), pad=3, sidecars=files)
    return folder


def ok(*args: str | Path) -> Done:
    """``rv ARGS``, which has to succeed."""
    done = run_rv(*args)
    assert done.status == 0, done.stderr
    return done


def transferred(models: Path, *more: str) -> tuple[dict[str, Raw], str]:
    """The tensors of a transfer, and what it printed. The output is verified, against its inputs too."""
    done = ok(*transfer(models, models / "out", f"--alpha={ALPHA}", *more))
    ok("verify", models / "out", "--against-inputs")
    return read_checkpoint(models / "out"), done.stdout


def applied(models: Path, *more: str) -> dict[str, Raw]:
    """The tensors of an extract and an apply, which is to give what a transfer gives."""
    inputs = ("--donor", models / "donor", "--reference", models / "reference")
    ok("extract", *inputs, "--out", models / "vector", "--runtime", "local", *more)
    ok("verify", models / "vector", "--against-inputs")
    inputs = ("--target", models / "target", "--vector", models / "vector")
    ok("apply", *inputs, f"--alpha={ALPHA}", "--out", models / "applied", "--runtime", "local", *more)
    return read_checkpoint(models / "applied")


def rows_of(out: Path) -> dict[str, TensorRow]:
    """The table of an output, by the tensors' names."""
    return {row.name: row for row in read_table((out / "rv_tensors.parquet").read_bytes())}
