"""Files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest

from rv_distributed.storage import publish as publishing
from rv_distributed.storage.publish import preallocate, publish, recover, remove, write_durably


@pytest.mark.parametrize("size", [0, 1, 4096, 1_000_003])
def test_a_new_file_has_its_size_and_reads_as_zeros(tmp_path: Path, size: int) -> None:
    path = tmp_path / "shard"
    preallocate(str(path), size)
    assert path.read_bytes() == bytes(size)


@pytest.mark.parametrize("size", [5, 6, 10_000], ids=["the same size", "a byte more", "pages more"])
def test_contents_are_kept_when_a_file_is_extended(tmp_path: Path, size: int) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"bytes")
    for _ in range(2):
        preallocate(str(path), size)
        assert path.read_bytes() == b"bytes" + bytes(size - 5)


def test_a_file_of_another_plan_gets_the_size_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"longer than it should be")
    preallocate(str(path), 6)
    assert path.read_bytes() == b"longer"


def test_the_space_is_reserved(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    preallocate(str(path), 1 << 20)
    stat = path.stat()
    assert (stat.st_size, stat.st_blocks * 512 >= 1 << 20) == (1 << 20, True)


class FailingLibrary:
    """A C library whose fallocate64 fails. Asking a real file system for too much would fill it first."""

    def __init__(self, code: int) -> None:
        self._code = code

    def fallocate64(self, *_: object) -> int:
        ctypes.set_errno(self._code)
        return -1


def test_space_that_is_not_there_is_an_error_that_keeps_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "begun").write_bytes(b"bytes of an earlier run")
    monkeypatch.setattr(publishing, "_c_library", lambda: FailingLibrary(errno.ENOSPC))
    for name, size in (("new", 10), ("begun", 23)):
        with pytest.raises(OSError, match="No space left on device") as caught:
            preallocate(str(tmp_path / name), size)
        assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path) == {"begun": b"bytes of an earlier run"}


def test_a_file_system_that_reserves_nothing_gets_a_sparse_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_c_library", lambda: FailingLibrary(errno.EOPNOTSUPP))
    preallocate(str(tmp_path / "shard"), 10)
    assert (tmp_path / "shard").read_bytes() == bytes(10)


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = str(tmp_path / "gone" / "shard")
    with pytest.raises(FileNotFoundError) as caught:
        preallocate(path, 10)
    assert caught.value.filename == path


def test_a_durable_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for data in (b"a longer first version", b"second", b""):
        write_durably(str(path), data)
        assert contents(tmp_path) == {"plan.json": data}


def test_a_durable_write_that_fails_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "plan.json"
    path.write_bytes(b"first")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_durably(str(path), b"second")
    assert caught.value.filename == f"{path}.new"
    assert contents(tmp_path) == {"plan.json": b"first"}


def folder(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_publishing_moves_the_staged_folder_into_place(tmp_path: Path) -> None:
    staged = folder(tmp_path / "staged", a=b"1", b=b"2")
    publish(str(staged), str(tmp_path / "out"), replaced=str(tmp_path / "replaced"))
    assert contents(tmp_path) == {"out/a": b"1", "out/b": b"2"}
    assert os.listdir(tmp_path) == ["out"]


def test_publishing_over_an_output_leaves_nothing_of_it(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", a=b"old", c=b"old")
    (out / "sub").mkdir()
    (out / "sub" / "d").write_bytes(b"old")
    staged = folder(tmp_path / "staged", a=b"new", b=b"new")
    publish(str(staged), str(out), replaced=str(tmp_path / "replaced"))
    assert contents(tmp_path) == {"out/a": b"new", "out/b": b"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_publishing_over_a_file_or_a_link_replaces_it_and_not_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "elsewhere", a=b"kept")
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / "file").write_bytes(b"old")
    for name in ("link", "file"):
        staged = folder(tmp_path / "staged", b=name.encode())
        publish(str(staged), str(tmp_path / name), replaced=str(tmp_path / "replaced"))
        assert not (tmp_path / name).is_symlink()
    assert contents(tmp_path) == {"elsewhere/a": b"kept", "link/b": b"link", "file/b": b"file"}
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "file", "link"]


def test_the_old_output_is_whole_until_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be exchanged: before and after each rename one of the three places holds each version."""
    out, replaced = folder(tmp_path / "out", a=b"old"), tmp_path / "replaced"
    staged = folder(tmp_path / "staged", a=b"new")
    seen = []
    rename = os.rename

    def recorded(source: str, target: str) -> None:
        rename(source, target)
        seen.append(contents(tmp_path))

    monkeypatch.setattr("rv_distributed.storage.publish._exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", recorded)
    publish(str(staged), str(out), replaced=str(replaced))
    assert seen == [{"replaced/a": b"old", "staged/a": b"new"}, {"replaced/a": b"old", "out/a": b"new"}]


def test_an_output_given_relative_to_the_working_folder_is_published_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for version in (b"first", b"second"):
        folder(tmp_path / "staged", a=version)
        publish("staged", "out", replaced="replaced")
        assert contents(tmp_path) == {"out/a": version}
        assert os.listdir(tmp_path) == ["out"]


#: What a crash leaves of the old output (in `replaced`) and the new one (in `out`), and what recovery makes of it.
CRASHES = {
    "nothing was begun": ({"out": b"old"}, {"out/a": b"old"}),
    "between the renames": ({"replaced": b"old"}, {"out/a": b"old"}),
    "before the old output was deleted": ({"replaced": b"old", "out": b"new"}, {"out/a": b"new"}),
    "without any output": ({}, {}),
}


@pytest.mark.parametrize(("left", "recovered"), CRASHES.values(), ids=CRASHES)
def test_recovery_ends_with_the_newest_whole_output_and_nothing_beside_it(
    tmp_path: Path, left: dict[str, bytes], recovered: dict[str, bytes]
) -> None:
    for name, version in left.items():
        folder(tmp_path / name, a=version)
    for _ in range(2):
        recover(str(tmp_path / "out"), replaced=str(tmp_path / "replaced"))
        assert contents(tmp_path) == recovered
        assert os.listdir(tmp_path) == (["out"] if recovered else [])


def test_recovery_brings_back_a_link_and_not_a_copy_of_what_it_leads_to(tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "elsewhere", a=b"kept")
    (tmp_path / "replaced").symlink_to(elsewhere)
    recover(str(tmp_path / "out"), replaced=str(tmp_path / "replaced"))
    assert (tmp_path / "out").readlink() == elsewhere
    assert contents(elsewhere) == {"a": b"kept"}


def test_removing_takes_a_folder_a_file_or_a_link_and_leaves_what_a_link_leads_to(tmp_path: Path) -> None:
    (folder(tmp_path / "folder", a=b"1") / "sub").mkdir()
    elsewhere = folder(tmp_path / "elsewhere", a=b"kept")
    (elsewhere / "file").write_bytes(b"kept")
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "folder" / "link").symlink_to(elsewhere)
    (tmp_path / "link to a folder").symlink_to(elsewhere)
    (tmp_path / "link to a file").symlink_to(elsewhere / "file")
    (tmp_path / "link to nothing").symlink_to(tmp_path / "nowhere")
    names = sorted(set(os.listdir(tmp_path)) - {"elsewhere"})
    assert len(names) == 5
    for name in [*names, "never there"]:
        remove(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["elsewhere"]
    assert contents(elsewhere) == {"a": b"kept", "file": b"kept"}
