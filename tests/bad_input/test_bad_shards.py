"""Shards, headers and indexes that are wrong: every one is refused before any output, naming what and where."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

import pytest
from refusal import INDEX, ONE, TWO, Spoil, assert_refused, make_models, run_rv, transfer

AGAIN = "Download the file again."
BOTH = "The index and the shards come from different versions of the model: download both again."


def raw_shard(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str = "BF16", shape: str = "[8]", start: object = 0, stop: object = 16) -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{start}, {stop}]}}'


def shard(*entries: str, data: int = 16) -> bytes:
    """A file whose header holds these entries, for tensors called norm, norm1, norm2, …"""
    names = ["norm", *(f"norm{number}" for number in range(1, len(entries)))]
    text = ", ".join(f'"{name}": {text}' for name, text in zip(names, entries, strict=True))
    return raw_shard(f"{{{text}}}".encode(), b"\0" * data)


def put(content: bytes) -> Spoil:
    """Make ``content`` the checkpoint's only shard."""

    def spoil(folder: Path) -> None:
        for name in (ONE, TWO, INDEX):
            (folder / name).unlink()
        (folder / "model.safetensors").write_bytes(content)

    return spoil


def point(tensor: str, to: str | None) -> Spoil:
    """Make the index say that ``to`` holds a tensor, or that there is no such tensor."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        index["weight_map"].pop(tensor, None)
        if to is not None:
            index["weight_map"][tensor] = to
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


def counted(*names: str) -> Spoil:
    """Make these the names of the first shards, without an index."""

    def spoil(folder: Path) -> None:
        (folder / INDEX).unlink()
        (folder / ONE).rename(folder / names[0])
        (folder / TWO).rename(folder / names[1])

    return spoil


def second_copy(folder: Path) -> None:
    (folder / TWO).write_bytes((folder / ONE).read_bytes())


def cut(folder: Path) -> None:
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-5])


class Bad(NamedTuple):
    """What is done to the donor, and what is told of it."""

    spoil: Spoil
    file: str
    what: str
    remedy: str = AGAIN
    tensor: str = ""


SINGLE = "model.safetensors"
DEEP = b'{"norm": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 42\n"

CASES = {
    "a missing shard named by the index": Bad(
        lambda f: (f / TWO).unlink(), INDEX, f"names the shard {TWO}, which is missing", "Download the shard"
    ),
    "a missing shard that only the names count": Bad(
        counted("model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"),
        "",
        "lacks model-00002-of-00004.safetensors, model-00004-of-00004.safetensors: its other shards' names count them",
        "Download what is missing",
    ),
    "many missing shards": Bad(
        counted("model-0-of-61.safetensors", "model-1-of-61.safetensors"),
        "",
        "lacks model-2-of-61.safetensors, model-3-of-61.safetensors, model-4-of-61.safetensors, "
        "model-5-of-61.safetensors, model-6-of-61.safetensors and 54 more: ",
        "Download what is missing",
    ),
    "a stale index": Bad(point("norm", ONE), INDEX, f"says {ONE}, but {TWO} holds it", BOTH, "norm"),
    "a tensor in the index that its shard lacks": Bad(
        point("head", TWO), INDEX, f"says that {TWO} holds it, but it does not", BOTH, "head"
    ),
    "a tensor that the index lacks": Bad(
        point("norm", None), INDEX, f"does not name it, but {TWO} holds it", BOTH, "norm"
    ),
    "a tensor in two shards": Bad(
        second_copy, "", f"stands in two shards, {ONE} and {TWO}", "Remove the shard", "embed"
    ),
    "an index that is no JSON": Bad(lambda f: (f / INDEX).write_text("{"), INDEX, "is not JSON"),
    "a weight_map entry that is absolute": Bad(
        point("norm", "/etc/passwd"), INDEX, "maps tensor 'norm' to '/etc/passwd', which is not a file name"
    ),
    "a weight_map entry with ..": Bad(
        point("norm", f"../reference/{TWO}"), INDEX, f"maps tensor 'norm' to '../reference/{TWO}', which is not"
    ),
    "a truncated shard": Bad(cut, TWO, "is truncated: the header describes 144 bytes of data, the file has 139"),
    "an empty shard": Bad(lambda f: (f / TWO).write_bytes(b""), TWO, "holds 0 bytes, too few"),
    "a header length beyond the file": Bad(
        put(raw_shard(b"{}", length=3)), SINGLE, "announces a header of 3 bytes, but the whole file has 10"
    ),
    "a header of more than 100 MB": Bad(
        put(raw_shard(b"{}", length=100_000_001)), SINGLE, "announces a header of 100000001 bytes; the format allows"
    ),
    "a header length of 64 bits": Bad(put(b"\xff" * 16), SINGLE, "announces a header of 18446744073709551615 bytes"),
    "a header that is not UTF-8": Bad(put(raw_shard(b'{"\xff": 1}')), SINGLE, "has a header that is not UTF-8"),
    "a header that is not JSON": Bad(put(raw_shard(b"{'norm': 1}")), SINGLE, "has a header that is not JSON"),
    "a header with a key twice": Bad(
        put(raw_shard(f'{{"norm": {entry()}, "norm": {entry()}}}'.encode(), b"\0" * 16)), SINGLE, "the key 'norm' twice"
    ),
    "a deeply nested header": Bad(put(raw_shard(DEEP)), SINGLE, "has a header that is not JSON"),
    "a huge integer": Bad(
        put(shard(entry(stop=10**40))), SINGLE, "has data_offsets that are not a pair of offsets", tensor="norm"
    ),
    "an integer of thousands of digits": Bad(
        put(shard(entry(stop="9" * 5000))), SINGLE, "has a header that is not JSON"
    ),
    "sizes whose product is huge": Bad(
        put(shard(entry(shape=f"[{2**40}, {2**40}]"))), SINGLE, "more elements than 64 bits can count", tensor="norm"
    ),
    "overlapping offsets": Bad(
        put(shard(entry(), entry(start=8, stop=24), data=24)), SINGLE, "overlaps the tensor before it", tensor="norm1"
    ),
    "offsets out of order": Bad(put(shard(entry(start=16, stop=0))), SINGLE, "has -16 bytes at 16 to 0", tensor="norm"),
    "a hole between the tensors": Bad(
        put(shard(entry(), entry(start=20, stop=36), data=36)),
        SINGLE,
        "leaves a hole before it: it starts at 20 instead of 16",
        tensor="norm1",
    ),
    "offsets beyond the data": Bad(
        put(shard(entry(), data=10)), SINGLE, "is truncated: the header describes 16 bytes of data, the file has 10"
    ),
    "bytes behind the data": Bad(put(shard(entry(), data=20)), SINGLE, "has 4 bytes behind the 16 bytes of data"),
    "a shape that does not fit the bytes": Bad(
        put(shard(entry(shape="[9]"))), SINGLE, "has 16 bytes at 0 to 16, but BF16 of shape [9] takes 18", tensor="norm"
    ),
    "an unknown dtype": Bad(put(shard(entry("Q4_K"))), SINGLE, "has the unknown dtype 'Q4_K'", tensor="norm"),
    "an entry with a missing key": Bad(
        put(shard('{"dtype": "BF16"}')), SINGLE, "needs exactly the keys dtype, shape and data_offsets", tensor="norm"
    ),
    "a Git LFS pointer": Bad(
        lambda f: (f / ONE).write_bytes(POINTER), ONE, "is a Git LFS pointer", "Run 'git lfs pull' in the repository."
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bad_file_is_refused_by_name_with_its_remedy(tmp_path: Path, case: Bad) -> None:
    models = make_models(tmp_path)
    case.spoil(models / "donor")
    where = str(models / "donor" / case.file).rstrip("/")
    subject = f"{where}: tensor {case.tensor!r}: " if case.tensor else f"{where}: "
    assert_refused(models, transfer(models, models / "out"), (subject, case.what, case.remedy))


def test_stray_shards_are_warned_of_and_not_read(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models / "donor" / "model-00003-of-00003.safetensors").write_bytes(b"not read")
    done = run_rv(*transfer(models, models / "out", "--dry-run"))
    assert done.status == 0
    where = models / "donor"
    assert f"warning: {where}: the index does not name model-00003-of-00003.safetensors: not read\n" in done.stderr


def test_the_problems_of_all_inputs_are_told_at_once(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    (models / "target" / ONE).write_bytes(POINTER)
    cut(models / "donor")
    (models / "reference" / "config.json").write_text("{")
    point("norm", ONE)(models / "reference")
    assert_refused(
        models,
        transfer(models, models / "out"),
        "rv: 4 problems with the inputs:\n",
        f"  1. {models / 'target' / ONE}: is a Git LFS pointer",
        f"  2. {models / 'donor' / TWO}: is truncated",
        f"  3. {models / 'reference' / INDEX}: tensor 'norm': says {ONE}",
        f"  4. {models / 'reference' / 'config.json'}: is not readable JSON",
    )
