"""What an unfinished run left is trusted only as far as it can be checked, and only by the same command."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal

import pytest
from blake3 import blake3

from faults.conftest import World
from faults.harness import STEPS, Fault, content_of, damage, lost_bytes, staged
from faults.test_kills import PIECES, copies, finished_pieces


def test_damage_to_records_and_staged_shards_is_found_and_made_again(world: World) -> None:
    template = finished_pieces(world)
    again = 0
    for seed, out in zip(range(16), copies(template), strict=False):
        choose = random.Random(seed)  # noqa: S311
        (folder,) = staged(out).glob("output-*")
        shards = sorted(folder.glob("*.safetensors"))
        for _ in range(choose.randint(1, 3)):
            damage(choose.choice([staged(out) / "records.jsonl", *shards]), choose)
        done = world.rv(out)
        told = done.stderr.splitlines()
        assert done.status == 0, seed
        assert all(line.startswith("warning: ") and "made again" in line for line in told), told
        assert lost_bytes(content_of(out), world.wanted) == 0, seed
        kept = re.search(rf"^(\d) of {PIECES} pieces kept", done.stdout, re.MULTILINE)
        again += kept is None or int(kept[1]) < PIECES
    assert again >= 8


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("alpha", "(alpha: then 0.7, now 0.3)"),
        ("options", "(--include: then not given, now first)"),
        ("input", "/inputs/donor, now "),
        ("version", "(rv-distributed: then 0.0.1, now "),
        ("torch", "(torch: then 1.0, now "),
    ],
)
def test_another_run_on_unfinished_pieces_is_refused_with_the_difference(world: World, what: str, told: str) -> None:
    out = finished_pieces(world) / "out"
    plan = staged(out) / "plan.json"
    alpha, more = ("0.3" if what == "alpha" else "0.7"), ("--include", "first") if what == "options" else ()
    command = world.command(out, *more, alpha=alpha)
    if what in ("version", "torch"):
        held = json.loads(plan.read_text())
        name, version = {"version": ("rv-distributed", "0.0.1"), "torch": ("torch", "1.0")}[what]
        held["identity"]["versions"][name] = version
        sealed = json.dumps([value for field, value in held.items() if field != "check"])
        plan.write_text(json.dumps({**held, "check": blake3(sealed.encode()).hexdigest(16)}))
    if what == "input":
        shutil.copytree(world.inputs / "donor", world.place / "donor")
        command = [world.place / "donor" if part == world.inputs / "donor" else part for part in command]
    before = plan.read_bytes()
    refused = world.zygote.run(*command)
    assert refused.status == 2
    assert told in refused.stderr
    assert "--restart" in refused.stderr
    assert plan.read_bytes() == before
    assert not out.exists()
    done = world.zygote.run(*command, "--restart")
    assert (done.status, done.stderr) == (0, "")
    assert "pieces kept" not in done.stdout
    assert not staged(out).exists()


@pytest.mark.parametrize("what", ["one letter of a digest", "a field less", "no object"])
def test_a_plan_that_has_changed_on_the_disk_is_refused(world: World, what: str) -> None:
    """A wrong digest in it would be taken for changed inputs, or would let changed inputs pass."""
    out = finished_pieces(world) / "out"
    plan = staged(out) / "plan.json"
    text = plan.read_text()
    match what:
        case "one letter of a digest":
            digest = re.findall(r"[0-9a-f]{64}", text)[0]
            plan.write_text(text.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1"), 1))
        case "a field less":
            plan.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "check"}))
        case "no object":
            plan.write_text("[]")
    refused = world.rv(out)
    assert refused.status == 2
    assert f"{plan}: what an unfinished run was making cannot be read" in refused.stderr
    assert "--restart" in refused.stderr
    done = world.rv(out, "--restart")
    assert (done.status, done.stderr) == (0, "")
    assert lost_bytes(content_of(out), world.wanted) == 0


def test_a_complete_output_is_left_as_it_is(world: World) -> None:
    out, log = world.place / "out", world.place / "log"
    assert world.rv(out).status == 0
    before = out.stat()
    done = world.zygote.run(*world.command(out), log=log)
    assert (done.status, done.stderr) == (0, "")
    assert "up to date, made at" in done.stdout
    assert "--overwrite makes it again" in done.stdout
    assert not [line for line in log.read_text().splitlines() if line.split(" ")[0] in STEPS.split("|")]
    assert out.stat() == before
    document = json.loads(world.rv(out, "--json").stdout)
    assert (document["status"], document["plan"]["bytes_written"]) == ("done", 0)
    assert document["outputs"][0]["manifest"] == json.loads((out / "rv_manifest.json").read_bytes())
    assert "up to date" in world.rv(out, "--dry-run").stdout
    assert "up to date" not in world.rv(out, "--overwrite").stdout
    assert content_of(out) == world.wanted


@pytest.mark.parametrize("what", ["a missing shard", "a short shard", "another alpha"])
def test_what_is_not_complete_is_not_called_so(world: World, what: str) -> None:
    out = world.place / "out"
    assert world.rv(out, alpha="0.3" if what == "another alpha" else "0.7").status == 0
    match what:
        case "a missing shard":
            (out / "model-00002-of-00002.safetensors").unlink()
        case "a short shard":
            os.truncate(out / "model-00002-of-00002.safetensors", 1000)
    refused = world.rv(out)
    assert refused.status == 2
    assert "already exists" in refused.stderr
    assert world.rv(out, "--overwrite").status == 0
    assert content_of(out) == world.wanted


def test_a_finished_output_leaves_the_pieces_of_a_later_overwrite_alone(world: World) -> None:
    """The first command, run again, has nothing to do; and nothing to clean up, since a later run is unfinished."""
    out = world.place / "out"
    assert world.rv(out).status == 0
    template = finished_pieces(world)
    shutil.copytree(staged(template / "out"), staged(out))
    assert "up to date" in world.rv(out).stdout
    done = world.rv(out, "--overwrite")
    assert f"{PIECES} of {PIECES} pieces kept" in done.stdout


def test_what_a_published_run_left_is_cleaned_up_by_the_next(world: World) -> None:
    out = world.place / "out"
    assert world.rv(out, faults=(Fault("unlink", "records.jsonl", 1, "kill"),)).status == -signal.SIGKILL
    assert staged(out).exists()
    assert "up to date" in world.rv(out).stdout
    assert not staged(out).exists()
