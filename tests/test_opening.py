"""Opening checkpoints: what is found in good ones, and every problem of bad ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from rv_distributed.checkpoint.header import HeaderEntry, build_header
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.errors import InputError, Problem, UsageError
from rv_distributed.opening import open_checkpoint

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ARRAYS: dict[str, Any] = {"a": np.arange(6, dtype="f4").reshape(2, 3), "b": np.arange(40_000, dtype="i8")}


def write_index(folder: Path, **weight_map: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards of a tensor each, their index, and a config."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": ARRAYS["a"]}, folder / ONE)
    save_file({"b": ARRAYS["b"]}, folder / TWO, metadata={"format": "pt"})
    write_index(folder, a=ONE, b=TWO)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def bytes_of(checkpoint: Checkpoint, tensor: Tensor) -> bytes:
    return Path(checkpoint.uri, tensor.file).read_bytes()[tensor.start : tensor.stop]


def assert_holds_the_arrays(checkpoint: Checkpoint, files: dict[str, str]) -> None:
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == files
    for name, dtype in (("a", "F32"), ("b", "I64")):
        tensor = checkpoint.tensors[name]
        assert (tensor.dtype, tensor.shape) == (dtype, ARRAYS[name].shape)
        assert bytes_of(checkpoint, tensor) == ARRAYS[name].tobytes()


def test_a_single_file_is_opened(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert_holds_the_arrays(checkpoint, {"a": "model.safetensors", "b": "model.safetensors"})
    assert checkpoint.uri == str(tmp_path)
    assert (checkpoint.parameters, checkpoint.weight_bytes) == (40_006, 320_024)
    assert checkpoint.dtypes == {"I64": 40_000, "F32": 6}
    assert (checkpoint.config, checkpoint.manifest, checkpoint.revision) == ({}, None, None)
    assert (checkpoint.warnings, checkpoint.sidecars) == ((), ())


def test_a_file_that_torch_saved_is_opened(tmp_path: Path) -> None:
    weight = torch.linspace(-1, 1, 12).reshape(3, 4).to(torch.bfloat16)
    save_torch_file({"weight": weight}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    tensor = checkpoint.tensors["weight"]
    assert (tensor.dtype, tensor.shape, tensor.elements) == ("BF16", (3, 4), 12)
    assert bytes_of(checkpoint, tensor) == weight.view(torch.uint8).numpy().tobytes()


def test_shards_with_an_index_are_opened_with_their_small_files(sharded: Path) -> None:
    (sharded / "tokenizer.json").write_text("{}")
    (sharded / "rv_manifest.json").write_text('{"schema_version": 1}')
    checkpoint = open_checkpoint(str(sharded))
    assert_holds_the_arrays(checkpoint, {"a": ONE, "b": TWO})
    assert [file[:2] for file in checkpoint.weight_files] == [
        (name, (sharded / name).stat().st_size) for name in (ONE, TWO)
    ]
    assert [file.name for file in checkpoint.sidecars] == ["config.json", "tokenizer.json"]
    assert (checkpoint.config, checkpoint.manifest) == ({"model_type": "llama"}, {"schema_version": 1})


def test_shards_without_an_index_are_all_opened(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert_holds_the_arrays(open_checkpoint(str(sharded)), {"a": ONE, "b": TWO})


def test_the_single_file_wins_over_others_when_there_is_no_index(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors")
    save_file({"c": ARRAYS["a"]}, tmp_path / "consolidated.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))
    assert_holds_the_arrays(checkpoint, {"a": "model.safetensors", "b": "model.safetensors"})


def test_a_stray_shard_is_not_read_and_warned_of(sharded: Path) -> None:
    (sharded / "model-00003-of-00003.safetensors").write_bytes(b"no header at all")
    checkpoint = open_checkpoint(str(sharded))
    assert_holds_the_arrays(checkpoint, {"a": ONE, "b": TWO})
    warning = f"{sharded}: the index does not name model-00003-of-00003.safetensors: not read"
    assert checkpoint.warnings == (warning,)


def test_a_header_longer_than_the_first_read_is_opened(tmp_path: Path) -> None:
    entries = {f"layers.{n}.weight": HeaderEntry("U8", (1,), n, n + 1) for n in range(6000)}
    header = build_header(entries, {})
    assert len(header) > 256 * 1024
    data = np.random.default_rng(1).bytes(6000)
    (tmp_path / "model.safetensors").write_bytes(header + data)
    checkpoint = open_checkpoint(str(tmp_path))
    assert b"".join(bytes_of(checkpoint, tensor) for tensor in list(checkpoint.tensors.values())[::999]) == data[::999]
    assert list(checkpoint.tensors) == list(entries)


def test_a_folder_of_the_hugging_face_cache_is_opened_with_its_revision(sharded: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--org--name"
    snapshot = model / "snapshots" / commit
    (model / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(model / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs", f"{number:064x}"))
    checkpoint = open_checkpoint(str(snapshot))
    assert_holds_the_arrays(checkpoint, {"a": ONE, "b": TWO})
    assert (checkpoint.uri, checkpoint.revision) == (str(snapshot), commit)
    assert checkpoint.config == {"model_type": "llama"}
    assert open_checkpoint(f"file://{snapshot}/").tensors == checkpoint.tensors

    (snapshot / TWO).resolve().unlink()
    with pytest.raises(InputError, match=f"names the shard {TWO}, which is missing"):
        open_checkpoint(str(snapshot))


FINGERPRINT = re.compile(r"blake3:[0-9a-f]{64}")


def test_the_same_content_elsewhere_has_the_same_fingerprint(sharded: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(sharded)).fingerprint
    shutil.copytree(sharded, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert FINGERPRINT.fullmatch(first)
    assert open_checkpoint(str(tmp_path / "elsewhere")).fingerprint == first


def change_middle(folder: Path) -> None:
    raw = bytearray((folder / TWO).read_bytes())
    start = len(raw) - ARRAYS["b"].nbytes
    raw[(start + len(raw)) // 2] ^= 1
    (folder / TWO).write_bytes(raw)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte in the middle": change_middle,
    "the header's metadata": lambda folder: save_file({"b": ARRAYS["b"]}, folder / TWO, metadata={"format": "np"}),
    "a tensor's dtype": lambda folder: save_file({"b": ARRAYS["b"].view("u8")}, folder / TWO),
    "a tensor's shape": lambda folder: save_file({"b": ARRAYS["b"].reshape(2, -1)}, folder / TWO),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_content_has_another_fingerprint(sharded: Path, change: Callable[[Path], object]) -> None:
    first = open_checkpoint(str(sharded)).fingerprint
    change(sharded)
    second = open_checkpoint(str(sharded)).fingerprint
    assert FINGERPRINT.fullmatch(second)
    assert second != first


def test_sidecars_are_no_part_of_the_fingerprint(sharded: Path) -> None:
    first = open_checkpoint(str(sharded)).fingerprint
    (sharded / "config.json").write_text("{}")
    assert open_checkpoint(str(sharded)).fingerprint == first


def cut(folder: Path, name: str, by: int) -> None:
    raw = (folder / name).read_bytes()
    (folder / name).write_bytes(raw[:-by])


def only_bin(folder: Path) -> None:
    for name in (ONE, TWO, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def one_more(folder: Path) -> None:
    save_file(ARRAYS | {"c": ARRAYS["a"]}, folder / ONE)
    write_index(folder, a=ONE, b=ONE)


def twice(folder: Path) -> None:
    save_file(ARRAYS, folder / TWO)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 42\n"
STALE = "download both again"

#: name → (what is done to the folder, the file at fault ('' for the folder), what is said, the remedy, the tensor)
BAD: dict[str, tuple[Callable[[Path], object], str, str, str, str | None]] = {
    "shard missing": (
        lambda f: (f / TWO).unlink(),
        INDEX,
        f"names the shard {TWO}, which is missing",
        "Download the shard",
        None,
    ),
    "index names a tensor that no shard holds": (
        lambda f: write_index(f, a=ONE, b=TWO, c=TWO),
        INDEX,
        f"says that {TWO} holds it, but it does not",
        STALE,
        "c",
    ),
    "index does not name a tensor": (
        one_more,
        INDEX,
        f"does not name it, but {ONE} holds it",
        STALE,
        "c",
    ),
    "index is no JSON": (
        lambda f: (f / INDEX).write_bytes(b'{"weight_map": '),
        INDEX,
        "is not JSON",
        "Download the file again",
        None,
    ),
    "index leaves the folder": (
        lambda f: write_index(f, a=ONE, b="../x.safetensors"),
        INDEX,
        "maps tensor 'b' to '../x.safetensors', which is not a file name in its folder",
        "Download the file again",
        None,
    ),
    "tensor in two shards": (twice, "", f"stands in two shards, {ONE} and {TWO}", "Remove the shard", "a"),
    "shard truncated": (lambda f: cut(f, TWO, 1), TWO, "is truncated", "Download the file again", None),
    "shard cut inside its header": (
        lambda f: (f / ONE).write_bytes((f / ONE).read_bytes()[:40]),
        ONE,
        "but the whole file has 40",
        "Download the file again",
        None,
    ),
    "shard empty": (lambda f: (f / ONE).write_bytes(b""), ONE, "holds 0 bytes", "Download the file again", None),
    "shard a web page": (
        lambda f: (f / ONE).write_bytes(b"<!doctype html><html></html>"),
        ONE,
        "announces a header of",
        "Download the file again",
        None,
    ),
    "shard a Git LFS pointer": (
        lambda f: (f / ONE).write_bytes(POINTER),
        ONE,
        "is a Git LFS pointer",
        "git lfs pull",
        None,
    ),
    "unknown dtype": (
        lambda f: (f / ONE).write_bytes(build_header({"a": HeaderEntry("Q4", (1,), 0, 1)}, {}) + b"x"),
        ONE,
        "has the unknown dtype 'Q4'",
        "Download the file again",
        "a",
    ),
    "only .bin weights": (
        only_bin,
        "",
        "holds pickled PyTorch weights (pytorch_model.bin) and no safetensors files",
        "convert other formats first",
        None,
    ),
    "config.json is no JSON": (
        lambda f: (f / "config.json").write_text("{'a': 1}"),
        "config.json",
        "is not readable JSON",
        "Download the file again",
        None,
    ),
    "config.json is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json",
        "is not a JSON object",
        "Download the file again",
        None,
    ),
    "rv_manifest.json is no JSON": (
        lambda f: (f / "rv_manifest.json").write_bytes(b"\xff"),
        "rv_manifest.json",
        "is not readable JSON",
        "Download the file again",
        None,
    ),
    "no folder": (shutil.rmtree, "", "does not exist", "Give the folder of a checkpoint", None),
}


def problems_of(uri: Path) -> tuple[Problem, ...]:
    with pytest.raises(InputError) as caught:
        open_checkpoint(str(uri))
    for problem in caught.value.problems:
        assert f"{problem.where}: " in str(caught.value)
        assert problem.remedy in str(caught.value)
    return caught.value.problems


@pytest.mark.parametrize(("spoil", "file", "what", "remedy", "tensor"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused_naming_file_fault_and_remedy(
    sharded: Path, spoil: Callable[[Path], object], file: str, what: str, remedy: str, tensor: str | None
) -> None:
    spoil(sharded)
    (problem,) = problems_of(sharded)
    assert (problem.where, problem.tensor) == (str(sharded / file), tensor)
    assert what in problem.what
    assert remedy in problem.remedy


def test_a_stale_index_is_refused_naming_each_tensor_that_moved(sharded: Path) -> None:
    write_index(sharded, a=TWO, b=ONE)
    assert [(p.where, p.tensor, p.what) for p in problems_of(sharded)] == [
        (str(sharded / INDEX), "a", f"says {TWO}, but {ONE} holds it"),
        (str(sharded / INDEX), "b", f"says {ONE}, but {TWO} holds it"),
    ]


def test_a_file_instead_of_a_folder_is_refused(sharded: Path) -> None:
    assert [(p.where, p.what) for p in problems_of(sharded / ONE)] == [(str(sharded / ONE), "is a file, not a folder")]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert [(p.where, p.what) for p in problems_of(tmp_path)] == [(str(tmp_path), "holds no safetensors files")]


def test_several_problems_are_told_at_once(sharded: Path) -> None:
    cut(sharded, ONE, 1)
    (sharded / TWO).write_bytes(POINTER)
    (sharded / "config.json").write_text("{")
    (sharded / "rv_manifest.json").write_text("3")
    found = {Path(problem.where).name: problem.what for problem in problems_of(sharded)}
    assert list(found) == [ONE, TWO, "config.json", "rv_manifest.json"]
    assert found[ONE].startswith("is truncated")
    assert found[TWO].startswith("is a Git LFS pointer")
    assert found["config.json"].startswith("is not readable JSON")
    assert found["rv_manifest.json"] == "is not a JSON object"


def test_a_missing_shard_a_bad_one_and_a_bad_config_are_told_at_once(sharded: Path) -> None:
    (sharded / TWO).unlink()
    cut(sharded, ONE, 1)
    (sharded / "config.json").write_text("{'model_type': 'llama'}")
    found = [(Path(problem.where).name, problem.what) for problem in problems_of(sharded)]
    assert [name for name, _ in found] == [INDEX, ONE, "config.json"]
    assert found[0][1] == f"names the shard {TWO}, which is missing"
    assert found[1][1].startswith("is truncated")
    assert found[2][1].startswith("is not readable JSON")


def test_all_missing_shards_are_told_at_once(sharded: Path) -> None:
    (sharded / ONE).unlink()
    (sharded / TWO).unlink()
    assert [problem.what for problem in problems_of(sharded)] == [
        f"names the shard {name}, which is missing" for name in (ONE, TWO)
    ]


def test_another_storage_is_a_usage_error_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match=r"^ftp://host/model: there is no storage for ftp:// here"):
        open_checkpoint("ftp://host/model")
