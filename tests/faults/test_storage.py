"""Storage that fails: no room, errors, calls that do less than asked for, places that cannot be written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from faults.conftest import World
from faults.harness import STEPS, Fault, content_of, lost_bytes, staged
from faults.test_kills import PIECES, copies, finished_pieces, records_of

SHARD = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (Fault("fallocate", "model-00002", 1, "ENOSPC"), f"bytes cannot be reserved: {os.strerror(errno.ENOSPC)}"),
        (Fault("fallocate", "model-00002", 1, "EOPNOTSUPP"), ""),
        (Fault("write", SHARD, 2, "ENOSPC"), f"{SHARD}, bytes"),
        (Fault("write", "records.jsonl", 3, "ENOSPC"), f"records.jsonl: {os.strerror(errno.ENOSPC)}"),
        (Fault("write", "rv_tensors.parquet", 1, "ENOSPC"), f"rv_tensors.parquet: {os.strerror(errno.ENOSPC)}"),
        (Fault("write", "plan.json", 1, "ENOSPC"), f"plan.json.new: {os.strerror(errno.ENOSPC)}"),
        (Fault("write", "rv_manifest.json", 1, "EDQUOT"), f"rv_manifest.json: {os.strerror(errno.EDQUOT)}"),
        (Fault("write", SHARD, 3, "EIO"), f"{SHARD}, bytes"),
        (Fault("read", "inputs/donor/model.safetensors", "5+", "EIO"), "donor/model.safetensors, bytes"),
        # What the page cache does not give is asked of the storage.
        (Fault("read", "inputs/donor/model.safetensors", 5, "EIO"), ""),
        (Fault("read", "inputs/target/original", 1, "EIO"), os.strerror(errno.EIO)),
        (Fault("fsync", SHARD, 1, "EIO"), f"{SHARD}, bytes"),
        (Fault("fsync", SHARD, 2, "EIO"), f"{SHARD}: {os.strerror(errno.EIO)}"),
        (Fault("rename", "/out", 1, "EIO"), os.strerror(errno.EIO)),
        (Fault("open|mkdir", ".out.rv/", "9+", "EROFS"), os.strerror(errno.EROFS)),
    ],
    ids=lambda value: f"{value.action} on {value.calls} of {value.where}" if isinstance(value, Fault) else "",
)
def test_an_error_of_the_storage_stops_the_run_and_the_next_one_resumes(world: World, fault: Fault, told: str) -> None:
    out = world.place / "out"
    done = world.rv(out, faults=(fault,))
    assert "Traceback" not in done.stderr
    if told:
        assert done.status in (1, 2), done
        assert told in done.stderr
        assert not out.exists()
        kept = records_of(out)
        done = world.rv(out)
        assert f"{kept} of {PIECES} pieces kept" in done.stdout or not kept
    assert (done.status, done.stderr) == (0, "")
    assert lost_bytes(content_of(out), world.wanted) == 0
    assert not staged(out).exists()


def test_a_disk_that_fills_up_while_records_are_written_costs_one_piece(world: World) -> None:
    """A record that is torn by a full disk is no record, and the next one does not stick to it."""
    out = world.place / "out"
    faults = (Fault("write", "records.jsonl", 3, "short"), Fault("write", "records.jsonl", "3+", "ENOSPC"))
    done = world.rv(out, faults=faults)
    assert done.status == 1, done
    assert records_of(out) == 2
    done = world.rv(out)
    assert (done.status, lost_bytes(content_of(out), world.wanted)) == (0, 0)
    assert f"2 of {PIECES} pieces kept" in done.stdout


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("action", ["short", "EINTR"])
def test_short_counts_and_interrupted_calls_change_nothing(world: World, action: str, seed: int) -> None:
    out = world.place / "out"
    faults = (Fault("read|write", "/", "~2", action), Fault("open|fsync|truncate", "/", "~3", "EINTR"))
    done = world.zygote.run(*world.command(out), faults=faults[: 1 if action == "short" else 2], seed=seed)
    assert (done.status, done.stderr) == (0, "")
    assert lost_bytes(content_of(out), world.wanted) == 0


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        pytest.param("rename|exchange|fsync", ("--overwrite",), id="fast"),
        pytest.param(STEPS, (), id="a new output", marks=pytest.mark.slow),
        pytest.param(STEPS, ("--overwrite",), id="an older output", marks=pytest.mark.slow),
    ],
)
def test_an_error_at_each_step_of_the_commit(world: World, steps: str, options: tuple[str, ...]) -> None:
    """The older output or the new one is there, whole; and the same command ends with the new one."""
    template = finished_pieces(world)
    if options:
        shutil.copytree(world.inputs.parent / "0.3", template / "out")
    failed = 0
    for nth, out in enumerate(copies(template), 1):
        log = world.place / f"log-{nth}"
        fault = Fault(steps, str(out.parent), nth, "EIO")
        done = world.zygote.run(*world.command(out, *options), faults=(fault,), log=log)
        assert "Traceback" not in done.stderr, done
        found = content_of(out) if out.exists() else None
        if done.status == 0:
            assert found == world.wanted
        else:
            assert done.status in (1, 2), done
            assert found in (world.wanted, world.older if options else None)
            failed += 1
        steps_taken = [line for line in log.read_text().splitlines() if line.split(" ")[0] in steps.split("|")]
        if len(steps_taken) < nth:
            break
        again = world.rv(out, *options)
        # An error after the output was published is none of the run: then there is nothing left to do.
        assert again.status == 0 or "already exists" in again.stderr, again
        assert lost_bytes(content_of(out), world.wanted) == 0
    assert failed >= 10


@pytest.fixture
def small_disk(world: World) -> Iterator[Path]:
    """A file system of 8 MiB."""
    yield from mounted(world.place / "disk", "size=8m")


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    command: list[str | Path] = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(path: Path, *, leave: int = 0) -> None:
    """Make a file that takes all the room that its file system has, but for ``leave`` bytes."""
    with path.open("wb") as file, suppress(OSError):  # no room
        while shutil.disk_usage(path.parent).free > leave:
            os.write(file.fileno(), bytes(4096))


def test_a_real_disk_without_room_is_refused_before_anything_is_written(world: World, small_disk: Path) -> None:
    fill(small_disk / "filler", leave=2 << 20)
    done = world.rv(small_disk / "out")
    assert done.status == 2
    assert "are free" in done.stderr
    assert os.listdir(small_disk) == ["filler"]


def test_a_real_disk_that_fills_up_during_the_run_is_survived(world: World, small_disk: Path) -> None:
    out = small_disk / "out"
    pid = world.zygote.begin(*world.command(out), faults=(Fault("write", "records.jsonl", 2, "stop"),))
    world.zygote.stopped()
    fill(small_disk / "filler")
    os.kill(pid, signal.SIGCONT)
    done = world.zygote.end()
    assert done.status == 1, done
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert "run the same command again to resume" in done.stderr
    assert not out.exists()
    (small_disk / "filler").unlink()
    done = world.rv(out)
    assert (done.status, lost_bytes(content_of(out), world.wanted)) == (0, 0)
    assert "pieces kept" in done.stdout


def test_a_read_only_output_is_refused_before_anything_is_written(world: World) -> None:
    for disk in mounted(world.place / "disk", "ro"):
        done = world.rv(disk / "out")
        assert done.status == 2
        assert f"{disk} cannot be written to" in done.stderr
        assert os.listdir(disk) == []


def test_an_output_is_staged_on_its_own_file_system(world: World, small_disk: Path) -> None:
    """It always is, beside it, so that one rename publishes it; unless somebody mounts something just there."""
    out = world.place / "out"
    done = world.rv(small_disk / "out", faults=(Fault("rename", "/out", 1, "kill"),))
    assert done.status == -signal.SIGKILL
    assert staged(small_disk / "out").stat().st_dev == small_disk.stat().st_dev
    for _ in mounted(staged(out), "size=8m"):
        done = world.rv(out)
        assert done.status == 2
        assert "another file system" in done.stderr
        assert not out.exists()
