"""Other processes: those that change an input, run on the same output, or send a signal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.conftest import World
from faults.harness import Fault, content_of, lost_bytes, staged
from faults.test_kills import PIECES

WEIGHTS = "model.safetensors"


def rewrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def replace(path: Path) -> None:
    new = path.with_name("new")
    shutil.copy2(path, new)
    new.replace(path)


@pytest.mark.parametrize("role", ["target", "donor", "reference"])
@pytest.mark.parametrize(
    ("change", "when"),
    [
        (rewrite, 2),
        (rewrite, 6),
        (replace, 3),
        (lambda path: os.truncate(path, 5000), 2),
        (lambda path: os.truncate(path, 5000), 6),
        (lambda path: path.unlink(), 3),
    ],
    ids=["rewritten", "rewritten at the end", "replaced", "truncated", "truncated at the end", "removed"],
)
def test_an_input_that_changes_during_the_run_is_never_published(
    world: World, role: str, change: Callable[[Path], object], when: int
) -> None:
    inputs, out = world.place / "inputs", world.place / "out"
    shutil.copytree(world.inputs, inputs)
    own = world._replace(inputs=inputs)
    faults = (Fault("write", f"{WEIGHTS[:5]}-", when, "stop"),)
    pid = world.zygote.begin(*own.command(out), faults=faults)
    world.zygote.stopped()
    change(inputs / role / WEIGHTS)
    os.kill(pid, signal.SIGCONT)
    done = world.zygote.end()
    assert done.status == 1, done
    assert f"{role}/{WEIGHTS} changed while it was read" in done.stderr
    assert "--restart" in done.stderr
    assert "to resume" not in done.stderr
    assert not out.exists()
    if change in (rewrite, replace):
        refused = own.rv(out)
        assert refused.status == 2
        assert f"(size or time of {inputs / role / WEIGHTS} changed, or it was replaced)" in refused.stderr
        assert own.rv(out, "--restart").status == 0
        assert (
            content_of(out)["model-00002-of-00002.safetensors"] == world.wanted["model-00002-of-00002.safetensors"]
        ) == (change is replace)


def test_a_second_run_on_an_output_is_refused_by_the_first_ones_name(world: World) -> None:
    out = world.place / "out"
    pid = world.zygote.begin(*world.command(out), faults=(Fault("write", "model-", 3, "stop"),))
    world.zygote.stopped()
    second = world.process(out)
    assert second.returncode == 2
    assert f"another run is writing it (process {pid} on {socket.gethostname()})" in second.stderr
    os.kill(pid, signal.SIGCONT)
    assert world.zygote.end().status == 0
    assert lost_bytes(content_of(out), world.wanted) == 0


def test_the_lock_of_a_process_that_was_killed_is_taken_over(world: World) -> None:
    """A real `rv` from the shell after its whole process group was killed."""
    out = world.place / "out"
    pid = world.zygote.begin(*world.command(out), faults=(Fault("write", "model-", 3, "stop"),))
    world.zygote.stopped()
    os.killpg(pid, signal.SIGKILL)
    assert world.zygote.end().status == -signal.SIGKILL
    assert str(pid) in (staged(out) / "lock").read_text()
    done = world.rv(out)
    assert (done.status, done.stderr) == (0, "")
    # The second piece is finished, and its record may have been written or not.
    assert re.search(rf"^[12] of {PIECES} pieces kept", done.stdout, re.MULTILINE)
    assert lost_bytes(content_of(out), world.wanted) == 0


@pytest.mark.parametrize(("action", "status"), [("int", 130), ("term", 143)])
@pytest.mark.parametrize(
    ("calls", "where", "nth"),
    [
        ("read", f"donor/{WEIGHTS}", 1),
        ("mkdir", "/.out.rv", 1),
        ("fallocate", "model-", 2),
        ("write", "model-", 1),
        ("write", "model-", 6),
        ("write", "records.jsonl", 4),
        ("open", "rv_tensors.parquet", 1),
        ("fsync", "README.md", 1),
        ("rename", "/plan.json", 2),
        ("rename", "/out", 1),
        ("unlink", "records.jsonl", 1),
    ],
    ids=lambda value: str(value),
)
def test_a_signal_stops_within_seconds_and_the_next_run_resumes(
    world: World, action: str, status: int, calls: str, where: str, nth: int
) -> None:
    out = world.place / "out"
    began = time.monotonic()
    done = world.rv(out, faults=(Fault(calls, where, nth, action),))
    assert time.monotonic() - began < 30  # a second, on a machine that is not busy with other things
    assert "Traceback" not in done.stderr
    assert done.status == status, done
    assert f"stopped by SIG{action.upper()}" in done.stderr
    assert "run the same command again to resume" in done.stderr
    if out.exists():
        assert content_of(out) == world.wanted
    done = world.rv(out)
    assert (done.status, done.stderr) == (0, "")
    assert lost_bytes(content_of(out), world.wanted) == 0
    assert not staged(out).exists()
