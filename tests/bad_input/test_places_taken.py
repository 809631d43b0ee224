"""What lies where an output is to go, and is not for us to replace."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from refusal import ROLES, Spoil, assert_refused, make_models, run_rv, transfer, tree

import rv_distributed as rv


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("kind", ["file", "link to a file"])
def test_a_file_is_not_replaced(tmp_path: Path, kind: str, more: tuple[str, ...]) -> None:
    models = make_models(tmp_path / "models")
    out = tmp_path / "notes.md"
    (tmp_path / "mine").write_text("precious")
    out.symlink_to(tmp_path / "mine") if kind != "file" else out.write_text("precious")
    told = "is no folder, so --overwrite leaves it alone. Give another --out, or move it away yourself."
    assert_refused(tmp_path, transfer(models, out, *more), told)
    assert out.read_text() == "precious"


def put(name: str) -> Spoil:
    def write(out: Path) -> None:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")

    return write


def many(out: Path) -> None:
    for letter in "abcde":
        put(letter)(out)


STRAYS: dict[str, tuple[Spoil, str]] = {
    "a file": (put("notes.txt"), "notes.txt. Move that away, or give another --out."),
    "a folder": (put("mystuff/eval_results.json"), "mystuff/eval_results.json. Move"),
    "a link": (lambda out: (out / "data").symlink_to(out.parent), "data. Move"),
    "another output": (lambda out: shutil.copytree(out, out.parent / "b").rename(out / "b"), "b/README.md, b/config"),
    "version control": (put(".git/HEAD"), ".git/HEAD. Move"),
    "a hidden file": (put(".env"), ".env. Move"),
    "many files": (many, "a, b, c and 2 more. Move"),
}


@pytest.mark.parametrize("what", STRAYS)
def test_an_output_that_holds_more_is_not_overwritten(tmp_path: Path, what: str) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    assert run_rv(*transfer(models, out)).status == 0
    spoil, named = STRAYS[what]
    spoil(out)
    told = f"{out}: holds what is not of the output, and --overwrite would delete: {named}"
    assert_refused(tmp_path, transfer(models, out, "--overwrite"), told)


def test_an_output_whose_manifest_is_broken_is_not_overwritten(tmp_path: Path) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    assert run_rv(*transfer(models, out)).status == 0
    os.truncate(out / "rv_manifest.json", 1000)
    told = "has a rv_manifest.json that cannot be read, so nothing tells which files in it are the output's. Give"
    assert_refused(tmp_path, transfer(models, out, "--overwrite"), told)


IGNORED = [
    "",
    ".cache/huggingface/x",
    "code/__pycache__/x.pyc",
    ".ipynb_checkpoints/config-checkpoint.json",
    ".DS_Store",
    "code/._config.json",
    "Thumbs.db",
    "desktop.ini",
    ".nfs0000000000a1b2c300000001",
]


@pytest.mark.parametrize("name", IGNORED, ids=str)
def test_what_is_ours_or_a_cache_is_replaced(tmp_path: Path, name: str) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    assert run_rv(*transfer(models, out)).status == 0
    wanted = tree(tmp_path)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    if name:
        (out / name).write_text("")
    assert run_rv(*transfer(models, out, "--overwrite", "--alpha", "0.3")).status == 0
    assert tree(tmp_path) == wanted


def test_a_link_means_the_place_that_it_leads_to(tmp_path: Path) -> None:
    models, out, link = make_models(tmp_path / "models"), tmp_path / "disk" / "run1", tmp_path / "latest"
    out.parent.mkdir()
    link.symlink_to(Path("disk", "run1"))
    assert run_rv(*transfer(models, link)).status == 0
    assert "up to date" in run_rv(*transfer(models, out)).stdout
    other = transfer(models, link, "--alpha", "0.5")
    assert_refused(tmp_path, other, f"{out}: already exists")
    (out / "notes.txt").write_text("precious")
    assert_refused(tmp_path, [*other, "--overwrite"], f"{out}: holds what is not of the output")
    (out / "notes.txt").unlink()
    assert run_rv(*other, "--overwrite").status == 0
    assert "up to date" in run_rv(*transfer(models, out, "--alpha", "0.5")).stdout
    assert run_rv("verify", link).status == 0
    assert os.readlink(link) == "disk/run1"
    assert sorted(os.listdir(tmp_path)) == ["disk", "latest", "models"]
    assert os.listdir(out.parent) == ["run1"]


def test_an_unfinished_run_is_resumed_through_a_link(tmp_path: Path) -> None:
    models, out, link = make_models(tmp_path / "models"), tmp_path / "disk" / "run1", tmp_path / "latest"
    out.parent.mkdir()
    out.symlink_to(tmp_path / "disk" / "run2")
    link.symlink_to(out)
    target, donor, reference = (str(models / role) for role in ROLES)

    def stop(_: rv.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rv.transfer(target, donor, reference, str(link), progress=stop)
    assert sorted(os.listdir(out.parent)) == [".run2.rv", "run1"]
    assert rv.transfer(target, donor, reference, str(tmp_path / "disk" / "run2")).timings.pieces_kept == 1


LINKS = {
    "a circle": ("out", "is a link that leads in a circle. Give another --out, or remove the link."),
    "no folder": (
        "gone/run1",
        "gone/run1, and {}/gone is no folder. Make that, give another --out, or remove the link.",
    ),
    "a folder of others": ("models", "models: is no output of rv, so --overwrite leaves it alone"),
}


@pytest.mark.parametrize("what", LINKS)
def test_a_link_that_leads_to_no_place_is_refused(tmp_path: Path, what: str) -> None:
    models = make_models(tmp_path / "in")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "thesis.tex").write_text("")
    to, told = LINKS[what]
    (tmp_path / "out").symlink_to(to)
    for more in ((), ("--dry-run",), ("--restart",)):
        assert_refused(tmp_path, transfer(models, tmp_path / "out", "--overwrite", *more), told.format(tmp_path))


def test_a_link_to_no_place_is_told_with_the_rest(tmp_path: Path) -> None:
    models, link = make_models(tmp_path / "models"), tmp_path / "out"
    link.symlink_to("gone/run1")
    shutil.rmtree(models / "donor")
    told = (f"{models / 'donor'}: does not exist", f"{link}: is a link to {tmp_path / 'gone' / 'run1'}, and ")
    assert_refused(tmp_path, transfer(models, link), *told)
