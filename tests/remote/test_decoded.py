"""What has to be decoded, read from object stores and written to them, against the same run on local folders."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from fp8_reference import fp8_config, random_fp8, write_fp8
from lora_reference import write_adapter
from reference import Raw, weights, write_checkpoint
from refusal import run_rv
from servers.stores import BUCKET, StoreServer, s3_client
from torch.distributed.checkpoint import state_dict_saver

from remote.checkpoints import NUMBERS, OPTIONS, comparable, content_of, files_of

SHAPES = {"layers.0.up": (900, 1900), "layers.1.up": (300, 200)}


def copied(server: StoreServer, folder: Path) -> str:
    """A local folder in S3."""
    prefix, client = f"decoded-{next(NUMBERS)}", s3_client(server.port)
    for path in files_of(folder):
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")
    return server.uri(prefix)


def plain(folder: Path, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    write_checkpoint(folder, {f"{name}.weight": weights(rng, "BF16", shape) for name, shape in SHAPES.items()})
    return folder


def test_fp8_and_an_adapter_in_s3_become_fp8_in_s3(s3: StoreServer, tmp_path: Path) -> None:
    rng, stored = np.random.default_rng(0), dict[str, Raw]()
    for name, shape in SHAPES.items():
        stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"] = random_fp8(rng, shape, "F32")
    write_fp8(tmp_path / "target", stored, fp8_config(), shards=2)
    plain(tmp_path / "base", 1)
    factors = {name: (weights(rng, "F32", (r, 8)), weights(rng, "F32", (8, c))) for name, (r, c) in SHAPES.items()}
    write_adapter(tmp_path / "adapter", factors)
    local = {role: str(tmp_path / role) for role in ("target", "base", "adapter")}
    remote = {role: copied(s3, tmp_path / role) for role in local}
    outs = str(tmp_path / "out"), s3.uri(f"out-{next(NUMBERS)}")
    for of, out in zip((local, remote), outs, strict=True):
        inputs = ["--target", of["target"], "--donor", f"{of['base']}+{of['adapter']}", "--reference", of["base"]]
        done = run_rv("transfer", *inputs, "--alpha", "0.7", "--requantize", "--out", out, *OPTIONS)
        assert done.status == 0, done.stderr
    made = {path.relative_to(outs[0]).as_posix(): path.read_bytes() for path in files_of(Path(outs[0]))}
    assert comparable(content_of(outs[1])) == comparable(made)
    assert b"layers.0.up.weight_scale_inv" in made["model.safetensors.index.json"]
    assert run_rv("verify", outs[1], "--against-inputs").status == 0
    assert run_rv("diff", *outs, "--exit-code").status == 0
    assert run_rv("diff", outs[1], remote["target"], "--exit-code").status == 3


def test_a_distributed_checkpoint_in_s3_is_read_by_its_parts(s3: StoreServer, tmp_path: Path) -> None:
    target, reference, twin = (plain(tmp_path / str(seed), seed) for seed in range(3))
    rng = np.random.default_rng(2)
    tensors = {}
    for name, shape in SHAPES.items():
        data = bytearray(weights(rng, "BF16", shape).data)
        tensors[f"{name}.weight"] = torch.frombuffer(data, dtype=torch.bfloat16).view(shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_saver.save({"model": tensors}, checkpoint_id=tmp_path / "donor", no_dist=True)
    outs = str(tmp_path / "out"), s3.uri(f"out-{next(NUMBERS)}")
    for donor, out in zip((str(twin), copied(s3, tmp_path / "donor")), outs, strict=True):
        inputs = ["--target", str(target), "--donor", donor, "--reference", str(reference)]
        done = run_rv("transfer", *inputs, "--alpha", "0.7", "--out", out, *OPTIONS)
        assert done.status == 0, done.stderr
    assert run_rv("diff", *outs, "--exit-code").status == 0
