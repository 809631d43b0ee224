"""The local runtime on storage that never answers."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from reference import weights, write_checkpoint
from refusal import make_models

import rv_distributed as rv
from rv_distributed.runtime import local
from rv_distributed.runtime.model import WorkerShape
from rv_distributed.storage import ending
from rv_distributed.storage.ranges import RangeReader


def test_a_read_that_never_returns_ends_the_run_and_the_next_one_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1_500_000,)
    folders = [
        write_checkpoint(tmp_path / role, {"w": weights(np.random.default_rng(n), "BF16", shape)}, sidecars={})
        for n, role in enumerate(("target", "donor", "reference"))
    ]
    out, answer = tmp_path / "out", threading.Event()
    plan = rv.PlanOptions(piece_bytes=1 << 20)
    read_cached = RangeReader.read_cached

    def hanging(self: RangeReader, window: memoryview, offset: int) -> int:
        if offset > 2_000_000:
            answer.wait()
        return read_cached(self, window, offset)

    t, a, b = map(str, folders)
    with monkeypatch.context() as patch:
        patch.setattr(RangeReader, "cache_fd", -1)
        patch.setattr(RangeReader, "read_cached", hanging)
        # The pieces before it may take as long as this machine needs.
        patch.setattr(local, "patience_s", lambda task, _outputs: 1.0 if task.piece.start >= 2 << 20 else 300.0)
        patch.setattr(ending, "END_S", 0.1)
        one = rv.RunOptions(runtime="local", workers=1)
        try:
            with pytest.raises(rv.WorkerError, match=r"model\.safetensors, bytes 2097152 to .* hangs"):
                rv.transfer(t, a, b, str(out), plan_options=plan, run_options=one)
        finally:
            answer.set()
            for thread in threading.enumerate():
                if thread.name.startswith("rv-stream"):
                    thread.join()
    assert not out.exists()
    (made,) = tmp_path.glob(".out.rv/output-*/model.safetensors")
    assert not any(made.read_bytes()[2 << 20 :]), "a stream wrote when its run had been given up"
    manifest = rv.transfer(t, a, b, str(out), plan_options=plan, run_options=rv.RunOptions(runtime="local"))
    assert (manifest.timings.pieces, manifest.timings.pieces_kept) == (3, 2)
    rv.verify(str(out))


#: ``rv`` whose reads go through threads of a pool, as over a network, and never return.
HANGING = """
import os, signal, threading
from rv_distributed.runtime import local
from rv_distributed.storage import ending, lease
from rv_distributed.storage.ranges import RangeReader

hangs = threading.Event()

def hang(*_):
    hangs.set()
    threading.Event().wait()

RangeReader.is_remote = True
RangeReader.read = hang
ending.END_S = 1.0
"""
#: It is given up soon.
GIVEN_UP = "local.patience_s = lambda *_: 1.0\n"
#: The place of the output hangs, too, for the lease and for the progress that is shown there.
OUTPUT_HANGS = """
from rv_distributed.staging import PosixStaging

def then_hanging(do):
    return lambda *args: hang() if hangs.is_set() else do(*args)

lease.BEAT_S = 0.1
lease._LockFile.read = then_hanging(lease._LockFile.read)
PosixStaging.show = then_hanging(PosixStaging.show)
"""
#: One signal comes once it hangs.
SIGNAL = """
def send():
    hangs.wait()
    os.kill(os.getpid(), signal.{})

threading.Thread(target=send, daemon=True).start()
"""
MAIN = "from rv_distributed.cli import main; main()"


@pytest.mark.parametrize("output", ["", OUTPUT_HANGS], ids=["inputs hang", "output hangs"])
@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        (GIVEN_UP, 1, "the storage of the inputs or of the output hangs"),
        (SIGNAL.format("SIGINT"), 130, "stopped by SIGINT"),
        (SIGNAL.format("SIGTERM"), 143, "stopped by SIGTERM"),
    ],
    ids=["given up", "SIGINT", "SIGTERM"],
)
def test_the_process_ends_though_its_threads_hang(
    tmp_path: Path, output: str, end: str, status: int, told: str
) -> None:
    models = make_models(tmp_path / "models")
    roles = [text for role in ("donor", "reference") for text in (f"--{role}", str(models / role))]
    script = HANGING + output + end + MAIN
    argv = [sys.executable, "-c", script, "extract", *roles, "--out", str(tmp_path / "out")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status
    assert told in ended.stderr
    assert "run the same command again to resume" in ended.stderr


@pytest.mark.parametrize(("device", "has_gpu"), [("cpu", False), ("cuda", True)])
def test_a_worker_has_the_gpu_that_its_torch_can_use(
    monkeypatch: pytest.MonkeyPatch, device: str, has_gpu: bool
) -> None:
    monkeypatch.setattr(local, "choose_device", lambda _: device)
    with local.LocalRuntime("auto", WorkerShape(2, has_gpu=True)) as runtime:
        assert runtime.shape == WorkerShape(2, has_gpu)
