"""Every dtype of the safetensors format: inspected and copied. See `matching/test_dtypes.py` for what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from refusal import run_rv

from rv_distributed.checkpoint.dtypes import DTYPES
from rv_distributed.checkpoint.header import tensor_bytes

SHAPE = (4, 8)


def write(folder: Path, seed: int, names: list[str]) -> Path:
    """A tensor of random bytes for each dtype, and one that can be computed."""
    folder.mkdir()
    rng, entries, data = np.random.default_rng(seed), {}, b""
    for name in ["BF16", *names]:
        raw = b"\x80\x3f" * 32 if name == "BF16" else rng.bytes(tensor_bytes(name, SHAPE))
        entries[name.lower()] = {"dtype": name, "shape": SHAPE, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def tensors(folder: Path) -> dict[str, bytes]:
    found: Any = safetensors.deserialize((folder / "model.safetensors").read_bytes())  # type: ignore[no-untyped-call]
    return {name: bytes(entry["data"]) for name, entry in found}


def test_the_format_s_own_reader_knows_all_of_them(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", 1, [name for name in DTYPES if name != "BF16"])
    assert len(tensors(folder)) == len(DTYPES)


def test_all_are_inspected(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", 1, [name for name in DTYPES if name != "BF16"])
    document = json.loads(run_rv("inspect", folder, "--json").stdout)
    assert document["dtypes"] == dict.fromkeys(DTYPES, 32)
    assert document["tensors"]["f4"]["stop"] - document["tensors"]["f4"]["start"] == 16
    shown = run_rv("inspect", folder).stdout
    assert all(f"{name} 32" in shown for name in DTYPES)


def test_all_are_copied_where_no_vector_is_added(tmp_path: Path) -> None:
    others = [name for name in DTYPES if name != "BF16"]
    for number, role in enumerate(("target", "donor", "reference")):
        write(tmp_path / role, number, others)
    inputs = [text for role in ("target", "donor", "reference") for text in (f"--{role}", tmp_path / role)]
    done = run_rv("transfer", *inputs, "--out", tmp_path / "out", "--include", "^bf16$", "--allow-nonfinite")
    assert done.status == 0, done.stderr
    assert tensors(tmp_path / "out") == tensors(tmp_path / "target")
