"""The files that a run makes: with the umask's permissions, and never writable for everyone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from refusal import make_models, run_rv, transfer

from rv_distributed.storage.places import staging_folder

RV = [sys.executable, "-c", "from rv_distributed.cli import main; main()"]
#: ``rv`` that stops when everything is staged and nothing is published.
STAGED = """
from rv_distributed.staging.posix import PosixStaging

def stop(self, manifest):
    raise OSError("stopped here")

PosixStaging.publish = stop
from rv_distributed.cli import main
main()
"""
UMASKS = {0o022: (0o755, 0o644), 0o077: (0o700, 0o600), 0o002: (0o775, 0o664), 0o000: (0o775, 0o664)}


def modes(folder: Path) -> set[tuple[bool, int]]:
    return {(path.is_dir(), path.stat().st_mode & 0o7777) for path in (folder, *folder.rglob("*"))}


@pytest.mark.parametrize("umask", UMASKS, ids=oct)
def test_files_and_folders_have_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    models = make_models(tmp_path)
    (models / "target" / "code").mkdir()
    (models / "target" / "code" / "model.py").write_text("")
    (models / "target" / "code" / "model.py").chmod(0o777)
    of_folders, of_files = UMASKS[umask]
    out = tmp_path / "new" / "out"
    argv = [sys.executable, "-c", STAGED, *map(str, transfer(models, out))]
    stopped = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, umask=umask)
    assert "stopped here" in stopped.stderr
    assert modes(Path(staging_folder(str(out)))) == {(True, of_folders), (False, of_files)}
    done = subprocess.run(
        [*RV, *map(str, transfer(models, out))], capture_output=True, text=True, timeout=120, check=False, umask=umask
    )
    assert done.returncode == 0, done.stderr
    assert modes(out.parent) == {(True, of_folders), (False, of_files)}


def test_nothing_executable_or_special_comes_with_a_small_file(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models / "target" / "run.sh").write_text("#!/bin/sh\n")
    (models / "target" / "run.sh").chmod(0o4755)
    os.mkfifo(models / "target" / "pipe")
    assert run_rv(*transfer(models, models / "out")).status == 0
    assert (models / "out" / "run.sh").stat().st_mode & 0o7111 == 0
    assert not (models / "out" / "pipe").exists()


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        (
            b"---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n",
            ["license: other", "qwen", "LICENSE"],
        ),
        (b"---\nlicense: " + b"[" * 100_000 + b"\n---\n", []),
        (b"---\nlicense: &a [*a]\n---\n", []),
        (b"---\nlicense: !!python/object/apply:os.system ['touch ran']\n---\n", []),
        (b"---\nlicense: mit\n---\n" + b"x" * 1_000_000, []),
    ],
    ids=["a licence of its own", "deep nesting", "a knot", "a Python object", "a megabyte"],
)
def test_a_card_of_the_target_is_read_safely(
    tmp_path: Path, card: bytes, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = make_models(tmp_path / "models")
    (models / "target" / "README.md").write_bytes(card)
    done = run_rv(*transfer(models, models / "out"))
    assert done.status == 0, done.stderr
    made = (models / "out" / "README.md").read_text()
    assert [text for text in wanted if text not in made] == []
    assert ("license" in made) == bool(wanted)
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(models / "out")
