"""Outputs that cannot be made where they are asked for, and inputs that cannot be read."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import INDEX, ONE, ROLES, TWO, assert_refused, make_models, run_rv, transfer, tree

from rv_distributed.storage.places import Room, check_rooms, rooms, staging_folder

RV = [sys.executable, "-c", "from rv_distributed.cli import main; main()"]


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("place", ["inside", "the same", "around", "through a link", "around through a link"])
def test_an_output_and_an_input_that_overlap_are_refused(
    tmp_path: Path, place: str, role: str, more: tuple[str, ...]
) -> None:
    models = make_models(tmp_path / "models")
    (tmp_path / "link").symlink_to(models)
    out = {
        "inside": models / role / "out",
        "the same": models / role,
        "around": models,
        "through a link": tmp_path / "link" / role / "deep" / "out",
        "around through a link": tmp_path / "link",
    }[place]
    meant = models if place == "around through a link" else out
    held = models / "target" if "around" in place else models / role
    told = f"rv: {meant}: the output and the input {held} overlap. "
    assert_refused(tmp_path, transfer(models, out, *more), told + "Give another --out.")


def test_an_input_inside_the_staging_place_of_the_output_is_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path / ".out.rv")
    assert staging_folder(str(tmp_path / "out")) == str(models)
    told = f"{tmp_path / 'out'}: the output and the input {models / 'target'} overlap. Give another --out."
    assert_refused(tmp_path, transfer(models, tmp_path / "out"), told)


def test_an_output_that_holds_the_files_that_an_input_links_to_is_not_overwritten(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    out = tmp_path / "out"
    assert run_rv(*transfer(models, out)).status == 0
    shutil.rmtree(models / "donor")
    (models / "donor").mkdir()
    (models / "donor" / "model.safetensors").symlink_to(out / "model.safetensors")
    told = f"{out}: the output and the input {models / 'donor'} overlap. Give another --out."
    assert_refused(tmp_path, transfer(models, out, "--overwrite"), told)


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    (tmp_path / "file").write_text("")
    told = f"{tmp_path / 'file' / 'out'}: {tmp_path / 'file'} is no folder. Give another --out."
    assert_refused(tmp_path, transfer(models, tmp_path / "file" / "out"), told)


def test_a_folder_that_is_no_output_of_ours_is_left_alone(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    told = f"{tmp_path / 'out'}: is no output of rv, so --overwrite leaves it alone. Give another --out, or move it"
    assert_refused(tmp_path, transfer(models, tmp_path / "out", "--overwrite"), told)


def test_bad_places_are_told_with_bad_inputs(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models / "reference" / INDEX).write_text("{")
    out = models / "target" / "out"
    told = [f"  1. {models / 'reference' / INDEX}: is not JSON", f"  2. {out}: the output and the input "]
    assert_refused(models, transfer(models, out), "rv: 2 problems with the inputs:\n", *told)


# Files that are not what they should be


@pytest.mark.parametrize("name", [INDEX, "config.json", "rv_manifest.json"])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    models = make_models(tmp_path)
    path = models / "donor" / name
    path.unlink(missing_ok=True)
    path.mkdir()
    told = (f"{path}: is a folder, but the model's file of this name is wanted. ", "Download the file again.")
    assert_refused(models, transfer(models, models / "out"), told)


def test_a_folder_in_place_of_a_shard_is_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models / "donor" / TWO).unlink()
    (models / "donor" / TWO).mkdir()
    told = (f"{models / 'donor' / INDEX}: names the shard {TWO}, which is missing. ", "Download the shard")
    assert_refused(models, transfer(models, models / "out"), told)


@pytest.mark.parametrize("leads_to", ["nowhere", "config.json"], ids=["dangling", "a loop"])
@pytest.mark.parametrize("name", [ONE, INDEX, "config.json", "tokenizer.json"])
def test_a_link_that_leads_to_no_file_is_named(tmp_path: Path, name: str, leads_to: str) -> None:
    models = make_models(tmp_path)
    path = models / "target" / name
    path.unlink(missing_ok=True)
    target = name if leads_to == "config.json" else leads_to
    path.symlink_to(target)
    told = (f"{path}: is a link to {target}, where no file can be reached. ", "Download the file again, or remove")
    assert_refused(models, transfer(models, models / "out"), told)


def test_a_link_that_belongs_to_no_model_may_dangle(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models / "target" / "pytorch_model.bin").symlink_to("nowhere")
    assert run_rv(*transfer(models, models / "out")).status == 0


# Root reads everything, unless it gives the capability up.
OBEYS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
needs_permissions = pytest.mark.skipif(bool(OBEYS and not shutil.which("setpriv")), reason="root needs setpriv")


def rv_that_obeys(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """``rv ARGS`` for which permissions hold."""
    argv = [*OBEYS, *RV, *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


UNREADABLE = {
    ONE: "cannot be read: Permission denied. Check its permissions and its storage.",
    INDEX: "cannot be read: Permission denied. Check its permissions and its storage.",
    "config.json": "cannot be read: Permission denied. Check its permissions and its storage.",
    "tokenizer.json": "cannot be read: Permission denied. Check its permissions and its storage.",
    "LICENSE": "cannot be read: Permission denied. Change its permissions.",
    "": "cannot be listed: Permission denied. Check its permissions.",
    "code": "cannot be listed: Permission denied. Check its permissions.",
}


@pytest.mark.parametrize("name", UNREADABLE)
@needs_permissions
def test_what_may_not_be_read_is_refused(tmp_path: Path, name: str) -> None:
    models = make_models(tmp_path)
    path = models / "target" / name
    for small in ("tokenizer.json", "LICENSE"):
        (models / "target" / small).write_text("{}")
    (models / "target" / "code").mkdir()
    path.chmod(0)
    before = tree(models)
    done = rv_that_obeys(*transfer(models, models / "out"))
    path.chmod(0o755)
    assert done.returncode == 2, done.stderr
    assert f"{str(path).rstrip('/')}: {UNREADABLE[name]}" in done.stderr
    assert tree(models) == before


@needs_permissions
def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models / "mine").mkdir(mode=0o555)
    before = tree(models)
    done = rv_that_obeys(*transfer(models, models / "mine" / "out"))
    assert done.returncode == 2
    assert f"{models / 'mine' / 'out'}: {models / 'mine'} cannot be written to. Give another --out" in done.stderr
    assert tree(models) == before


# Room


def huge_models(folder: Path, data_bytes: int) -> Path:
    """Three models of one tensor with a hole of ``data_bytes`` for its data, which takes no room."""
    for number, role in enumerate(ROLES):
        (folder / role).mkdir(parents=True)
        tensor = {"dtype": "BF16", "shape": [data_bytes // 2], "data_offsets": [0, data_bytes]}
        header = json.dumps({"__metadata__": {"role": str(number)}, "weight": tensor}).encode()
        with open(folder / role / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + data_bytes)
    return folder


def part_of_free(folder: Path, part: float) -> int:
    return int(shutil.disk_usage(folder).free * part) // 2 * 2


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_outputs_that_do_not_fit_together_are_refused(tmp_path: Path, more: tuple[str, ...]) -> None:
    models = huge_models(tmp_path / "models", part_of_free(tmp_path, 0.6))
    assert run_rv(*transfer(models, tmp_path / "out", "--dry-run")).status == 0
    before = tree(tmp_path)
    done = run_rv(*transfer(models, tmp_path / "out-{alpha}", "--alpha", "0.5,0.7", "--quiet", *more))
    (room,) = rooms([str(tmp_path / "out")], 0)
    assert done.status == 2
    assert f"rv: {room.folder}: the outputs there take " in done.stderr
    assert " are free. Free some space, or give another --out." in done.stderr
    assert tree(tmp_path) == before


def test_each_file_system_is_counted_for_itself(tmp_path: Path) -> None:
    other = Path("/dev/shm")  # noqa: S108 (nothing is written there)
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    outs = [str(tmp_path / "a"), str(tmp_path / "new" / "b"), str(other / "rv-test" / "deep" / "c")]
    here, there = rooms(outs, 1000)
    assert (here.needed, there.needed) == (2000, 1000)
    assert there.folder == str(other)
    assert os.path.ismount(here.folder)
    assert str(tmp_path).startswith(here.folder)
    assert there.free == pytest.approx(shutil.disk_usage(other).free, abs=1 << 28)


def test_what_an_unfinished_run_has_reserved_counts_as_free(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    os.makedirs(staging_folder(out))
    with open(os.path.join(staging_folder(out), "shard"), "wb") as file:
        file.write(b"x" * (1 << 20))
        file.flush()
        os.fsync(file.fileno())
    held = os.stat(os.path.join(staging_folder(out), "shard")).st_blocks * 512
    (room,) = rooms([out], 1)
    assert held >= 1 << 20
    assert room.free - held == pytest.approx(shutil.disk_usage(tmp_path).free, abs=1 << 28)


def test_every_file_system_that_is_too_small_is_named() -> None:
    check_rooms([Room("/a", 10, 10)])
    wanted = r"^/a: the outputs there take 11 bytes, 10 are free; /c: the outputs there take 3 bytes, 2 are free\. Free"
    with pytest.raises(Exception, match=wanted) as caught:
        check_rooms([Room("/a", 11, 10), Room("/b", 1, 10), Room("/c", 3, 2)])
    assert getattr(caught.value, "exit_status", None) == 2
