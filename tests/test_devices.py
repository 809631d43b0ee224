"""GPUs: asked of Ray and refused where torch has none; the same bytes from CUDA where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triples import ok

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.kernels.combine import Combiner
from rv_distributed.runtime import compute
from rv_distributed.runtime.torch_block import TorchBlock

#: A Ray that believes in two GPUs, on a machine whose torch sees none: every actor is placed on one of them.
FAKE_GPUS = """
import sys
import ray
import rv_distributed as rv

ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
try:
    rv.transfer(*sys.argv[1:], run_options=rv.RunOptions(runtime="ray", device="cuda"))
except rv.UsageError as error:
    print(error)
"""


def python(*argv: str, visible: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(str(folder))
    return folder


def places(models: Path, out: Path) -> list[str]:
    return [str(models / role) for role in ("target", "donor", "reference")] + [str(out)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal it waits for needs a machine without GPUs")
def test_actors_are_put_on_the_gpus_that_ray_has(models: Path, tmp_path: Path) -> None:
    done = python(FAKE_GPUS, *places(models, tmp_path / "out"), visible="0,1")
    assert done.returncode == 0, done.stderr
    assert "--device cuda: torch sees no GPU here" in done.stdout
    assert not (tmp_path / "out").exists()


def test_cuda_is_refused_before_anything_is_written_where_torch_has_none(models: Path, tmp_path: Path) -> None:
    target, donor, reference, out = places(models, tmp_path / "out")
    inputs = ["--target", target, "--donor", donor, "--reference", reference]
    script = "from rv_distributed.cli import main; main()"
    done = python(script, "transfer", *inputs, "--out", out, "--device", "cuda", visible="")
    assert done.returncode == 2
    assert "use --device cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_without_memory_ends_the_run_with_the_remedy(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Combiner, "combine", full)
    _stand_in(monkeypatch)
    with pytest.raises(rv.RunError, match="too little memory left: a smaller --memory-budget"):
        rv.transfer(*places(models, tmp_path / "out"), run_options=rv.RunOptions(runtime="local"))


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the processor's torch compute the blocks that a GPU's would."""
    monkeypatch.setattr(compute, "_choose_block", lambda config, _device, nbytes: TorchBlock(config, "cpu", nbytes))


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_blocks_of_a_gpu_have_the_bytes_of_the_cpu_s(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute_dtype: Any, rounding: Any
) -> None:
    """Without a GPU: what goes into a block and comes out of it is the same."""
    options = rv.PlanOptions(compute_dtype=compute_dtype, rounding=rounding)
    files = []
    for name in ("cpu", "gpu"):
        out = tmp_path / name
        rv.transfer(*places(models, out), alpha=0.7, plan_options=options, run_options=rv.RunOptions(runtime="local"))
        files.append((out / "model.safetensors").read_bytes())
        _stand_in(monkeypatch)
    assert files[0] == files[1]


@pytest.mark.gpu
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_cuda_gives_the_bytes_of_the_cpu(models: Path, tmp_path: Path, compute_dtype: str, rounding: str) -> None:
    """Also in the same process, again, which pins memory where other memory was pinned before."""
    options = ("--alpha", "0.7", "--compute-dtype", compute_dtype, "--rounding", rounding, "--runtime", "local")
    inputs = [text for role in ("target", "donor", "reference") for text in (f"--{role}", models / role)]
    files = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        ok("transfer", *inputs, "--out", out, *options, "--device", device)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.gpu
def test_a_worker_of_ray_on_a_gpu_gives_the_bytes_of_the_cpu(models: Path, tmp_path: Path) -> None:
    files = []
    for how in (rv.RunOptions(runtime="local", device="cpu"), rv.RunOptions(runtime="ray", device="cuda")):
        out = tmp_path / how.runtime
        rv.transfer(*places(models, out), alpha=0.7, run_options=how)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]
