"""What lies where an output is to go, and is not for us to replace."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from refusal import Spoil, assert_refused, make_models, run_rv, transfer, tree


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


@pytest.mark.parametrize("name", ["", ".cache/huggingface/x", "code/__pycache__/x.pyc"], ids=str)
def test_what_is_ours_or_a_cache_is_replaced(tmp_path: Path, name: str) -> None:
    models, out = make_models(tmp_path / "models"), tmp_path / "out"
    assert run_rv(*transfer(models, out)).status == 0
    wanted = tree(tmp_path)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    if name:
        (out / name).write_text("")
    assert run_rv(*transfer(models, out, "--overwrite", "--alpha", "0.3")).status == 0
    assert tree(tmp_path) == wanted
