"""SIGKILL at every step: the output is there whole or not at all, and the same command finishes it."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from faults.conftest import World
from faults.harness import STEPS, Fault, content_of, lost_bytes, staged

PIECES = 6
#: Steps that make, move or delete names. Dying between two writes to one file, or before a flush, which changes nothing
#: that the next run can see, is tried in the slow tests.
FAST_STEPS = "open|mkdir|rename|exchange|unlink"
NO_EXCHANGE = Fault("exchange", "/", "1+", "EINVAL")


def records_of(out: Path) -> int:
    """How many pieces the staging place of ``out`` has a whole record of."""
    journal = staged(out) / "records.jsonl"
    return sum(line.endswith(', ""]') for line in journal.read_text().splitlines()) if journal.exists() else 0


def check_place(world: World, out: Path, older: dict[str, bytes] | None, *, exchanges: bool = True) -> None:
    """The output is the new one or the older one, whole; without an older one it may be missing."""
    replaced = staged(out) / "replaced"
    if out.exists():
        assert content_of(out) in (world.wanted, older)
    elif older is not None:
        assert not exchanges, "the output's name was gone"
        assert content_of(replaced) == older


def check_rerun(world: World, out: Path, *options: str) -> None:
    """The same command keeps what was finished, says so, and ends with the same bytes as an undisturbed run."""
    was_published = out.exists() and content_of(out) == world.wanted
    if "--overwrite" in options:  # which asks for a new one, unless a run was stopped before it had cleaned up
        was_published &= (staged(out) / "plan.json").exists()
    kept = records_of(out)
    done = world.rv(out, *options)
    assert (done.status, done.stderr) == (0, "")
    assert lost_bytes(content_of(out), world.wanted) == 0
    assert not staged(out).exists()
    if was_published:
        assert "up to date" in done.stdout
    elif kept:
        assert f"{kept} of {PIECES} pieces kept from an earlier run" in done.stdout


def finished_pieces(world: World) -> Path:
    """A folder with a run that has made all pieces and committed nothing."""
    template = world.place / "template"
    template.mkdir()
    done = world.rv(template / "out", faults=(Fault("open", "rv_tensors.parquet", 1, "kill"),))
    assert (done.status, records_of(template / "out")) == (-signal.SIGKILL, PIECES)
    return template


def copies(template: Path) -> Iterator[Path]:
    """The output in fresh copies of a folder, each deleted again."""
    for number in count():
        copy = template.parent / f"copy-{number}"
        shutil.copytree(template, copy)
        yield copy / "out"
        shutil.rmtree(copy)


def kill_at_every_step(world: World, template: Path, steps: str, *options: str, exchanges: bool = True) -> int:
    """Kill a run at each of its steps, in a copy of ``template`` each time; the number of steps."""
    older = world.older if "--overwrite" in options else None
    extra = () if exchanges else (NO_EXCHANGE,)
    for nth, out in enumerate(copies(template), 1):
        done = world.rv(out, *options, faults=(*extra, Fault(steps, str(out.parent), nth, "kill")))
        check_place(world, out, older, exchanges=exchanges)
        if done.status == 0:
            assert content_of(out) == world.wanted
            return nth - 1
        assert done.status == -signal.SIGKILL, done
        check_rerun(world, out, *options)
    raise AssertionError


@pytest.mark.parametrize(
    ("steps", "least", "older", "exchanges"),
    [
        pytest.param(FAST_STEPS, 15, False, True, id="a new output"),
        pytest.param(FAST_STEPS, 15, True, True, id="an older output"),
        pytest.param("rename|unlink", 15, True, False, id="an older output, without exchange of names"),
    ],
)
def test_killed_at_each_step_of_the_commit(world: World, steps: str, least: int, older: bool, exchanges: bool) -> None:
    template = finished_pieces(world)
    options = ["--overwrite"] if older else []
    if older:
        shutil.copytree(world.inputs.parent / "0.3", template / "out")
    assert kill_at_every_step(world, template, steps, *options, exchanges=exchanges) >= least


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_killed_at_every_step_of_a_run(world: World, options: tuple[str, ...]) -> None:
    template = world.place / "template"
    template.mkdir()
    if options:
        shutil.copytree(world.inputs.parent / "0.3", template / "out")
    assert kill_at_every_step(world, template, STEPS, *options) > 60


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_at_random_moments(world: World, seed: int) -> None:
    """With several streams, and each resumed run killed too, until one comes through."""
    choose, out = random.Random(seed), world.place / "out"  # noqa: S311
    for _ in range(100):
        fault = Fault("write|open|fsync|rename", ".out.rv/", choose.randint(1, choose.choice((20, 20, 120))), "kill")
        kept = records_of(out)
        done = world.zygote.run(*world.command(out, workers=choose.choice((2, 3))), faults=(fault,))
        if done.status == 0:
            break
        assert done.status == -signal.SIGKILL
        assert not out.exists()
        assert records_of(out) >= kept
    assert kept == 0 or re.search(rf"^{kept} of {PIECES} pieces kept", done.stdout, re.MULTILINE)
    assert lost_bytes(content_of(out), world.wanted) == 0


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_a_sweep_killed_between_two_outputs_goes_on_with_the_second(world: World, options: tuple[str, ...]) -> None:
    outs = {alpha: world.place / f"out-{alpha}" for alpha in ("0.3", "0.7")}
    for out in outs.values() if options else ():
        shutil.copytree(world.inputs.parent / "0.7", out)
    sweep = world.command(world.place / "out-{alpha}", *options, alpha="0.3,0.7")
    done = world.zygote.run(*sweep, faults=(Fault("rename|exchange", "/out-0.7", 1, "kill"),))
    assert done.status == -signal.SIGKILL
    assert content_of(outs["0.3"]) == world.older
    assert outs["0.7"].exists() == bool(options)
    inode = outs["0.3"].stat().st_ino
    done = world.zygote.run(*sweep)
    assert (done.status, done.stderr) == (0, "")
    assert done.stdout.count("up to date, made at") == 1
    assert f"{PIECES} of {PIECES} pieces kept" in done.stdout
    assert outs["0.3"].stat().st_ino == inode
    assert (content_of(outs["0.3"]), content_of(outs["0.7"])) == (world.older, world.wanted)
    assert not any(staged(out).exists() for out in outs.values())


def test_power_lost_after_success_loses_nothing(world: World) -> None:
    """Before the rename that publishes, every file is flushed after its last write and every folder after its last
    new name; afterwards the folder with the output's name is."""
    out, log = world.place / "deep" / "out", world.place / "log"
    assert world.zygote.run(*world.command(out), log=log).status == 0
    steps = [(call, Path(path)) for call, path in (line.split(" ", 1) for line in log.read_text().splitlines())]
    published = steps.index(("rename", out))
    work = staged(out)
    flushed: dict[Path, bool] = {}
    for call, path in steps[:published]:
        if call == "fsync":
            flushed[path] = True
        elif call in ("write", "truncate", "fallocate"):
            flushed[path] = False
        if call in ("mkdir", "rename", "open"):
            flushed[path.parent] = False
    passing = {work / name for name in ("lock", "records.jsonl", "progress.json", "progress.json.new")}
    needed = {path: state for path, state in flushed.items() if path not in passing}
    del needed[work / "plan.json.new"]  # renamed, after it was flushed
    assert needed[world.place]
    unflushed = [path for path, state in needed.items() if not state]
    assert unflushed in ([], [work])
    after = [step for step in steps[published + 1 :] if step[0] in ("write", "fsync")]
    assert after[0] == ("fsync", out.parent)
    assert not any(path.is_relative_to(out) for _, path in after)
