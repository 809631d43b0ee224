"""`verify` finds every way in which an output can differ from what was written, and names the file at fault."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.storage.posix import PosixFolder
from rv_distributed.storage.ranges import RangeReader
from rv_distributed.verification.output import open_output

PIECE = 1 << 20
PLAN = rv.PlanOptions(max_shard_bytes=4_000_000, piece_bytes=PIECE)
MANIFEST, TABLE, INDEX = "rv_manifest.json", "rv_tensors.parquet", "model.safetensors.index.json"

Damage = Callable[[Path], set[str]]
"""Damages an output and returns the names of all files that `verify` has to name."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("made")
    make_checkpoints(str(root))
    target, donor, reference, out = (str(root / name) for name in ("target", "donor", "reference", "out"))
    (root / "target" / "vocab.txt").write_bytes(b"a\nb\nc\n")
    how = rv.RunOptions(runtime="local", workers=2)
    rv.transfer(target, donor, reference, out, alpha=0.7, plan_options=PLAN, run_options=how)
    yield root / "out"
    shutil.rmtree(root)


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A fresh copy of the output."""
    copy = tmp_path / "out"
    shutil.copytree(made, copy)
    yield copy
    shutil.rmtree(copy)


def shards(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.safetensors"))


def flip(path: Path, offset: int, mask: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def findings_of(out: Path) -> tuple[rv.Finding, ...]:
    with pytest.raises(rv.VerifyError) as caught:
        rv.verify(str(out))
    assert caught.value.findings
    assert all(finding.what for finding in caught.value.findings)
    return caught.value.findings


def test_an_untouched_output_passes_and_gives_its_manifest(out: Path) -> None:
    assert len(shards(out)) > 2
    document = json.loads((out / MANIFEST).read_bytes())
    calls: list[tuple[int, int]] = []
    manifest = rv.verify(str(out), progress=lambda done, total: calls.append((done, total)))
    assert json.loads(manifest.to_json()) == document
    assert [shard.name for shard in manifest.shards] == shards(out)
    total = sum(tensor.stop - tensor.start for tensor in rv.open_checkpoint(str(out)).tensors.values())
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("part", [0.0, 0.26, 0.5, 0.999999])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.3.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_flipped_bit_is_found_in_its_tensor_and_its_piece(out: Path, name: str, part: float) -> None:
    tensor = rv.open_checkpoint(str(out)).tensors[name]
    offset = tensor.start + int(part * (tensor.stop - tensor.start))
    flip(out / tensor.file, offset, 1 << 6)
    (finding,) = findings_of(out)
    assert (finding.file, finding.tensor) == (tensor.file, name)
    assert finding.start is not None
    assert finding.stop is not None
    assert tensor.start <= finding.start <= offset < finding.stop <= tensor.stop
    assert finding.stop - finding.start <= PIECE


def test_every_one_of_several_flipped_bits_is_found(out: Path) -> None:
    tensors = rv.open_checkpoint(str(out)).tensors
    names = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"]
    for name in names:
        flip(out / tensors[name].file, tensors[name].stop - 1)
    assert {(finding.file, finding.tensor) for finding in findings_of(out)} == {(tensors[n].file, n) for n in names}


def header_flipped(offset: int, mask: int) -> Damage:
    def damage(out: Path) -> set[str]:
        flip(out / shards(out)[1], offset, mask)
        return {shards(out)[1]}

    return damage


def cut(bytes_left: int | None) -> Damage:
    def damage(out: Path) -> set[str]:
        path = out / shards(out)[1]
        path.write_bytes(path.read_bytes()[: -1 if bytes_left is None else bytes_left])
        return {path.name}

    return damage


def lengthened(out: Path) -> set[str]:
    with (out / shards(out)[-1]).open("ab") as file:
        file.write(b"\0")
    return {shards(out)[-1]}


def missing(name: str) -> Damage:
    def damage(out: Path) -> set[str]:
        path = out / (name or shards(out)[1])
        path.unlink()
        return {path.name}

    return damage


def changed(name: str, content: bytes | None = None) -> Damage:
    def damage(out: Path) -> set[str]:
        if content is None:
            flip(out / name, (out / name).stat().st_size // 2)
        else:
            (out / name).write_bytes(content)
        return {name}

    return damage


def added(name: str) -> Damage:
    def damage(out: Path) -> set[str]:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(b"more")
        return {name}

    return damage


def renamed(old: str, new: str) -> Damage:
    def damage(out: Path) -> set[str]:
        name = old or shards(out)[1]
        (out / name).rename(out / new)
        return {name, new}

    return damage


def swapped_in_the_index(out: Path) -> set[str]:
    document = json.loads((out / INDEX).read_bytes())
    size = (out / INDEX).stat().st_size
    weight_map, (one, other) = document["weight_map"], ("model.embed_tokens.weight", "model.norm.weight")
    assert weight_map[one] != weight_map[other]
    text = (out / INDEX).read_text().replace(f'"{one}": "{weight_map[one]}"', f'"{one}": "{weight_map[other]}"')
    (out / INDEX).write_text(text.replace(f'"{other}": "{weight_map[other]}"', f'"{other}": "{weight_map[one]}"'))
    found = json.loads((out / INDEX).read_bytes())["weight_map"]
    assert (found[one], found[other], (out / INDEX).stat().st_size) == (weight_map[other], weight_map[one], size)
    return {INDEX}


def swapped_shards(out: Path) -> set[str]:
    first, second = shards(out)[0], shards(out)[1]
    (out / first).rename(out / "between")
    (out / second).rename(out / first)
    (out / "between").rename(out / second)
    return {first, second}


DAMAGES: dict[str, Damage] = {
    "header length by one": header_flipped(0, 1),
    "header length of many GB": header_flipped(6, 0x40),
    "header length negative": header_flipped(7, 0x80),
    "header not JSON": header_flipped(8, 1),
    "header not UTF-8": header_flipped(30, 0x80),
    "header with another number or name": header_flipped(90, 1),
    "shard without its last byte": cut(None),
    "shard cut in its header": cut(100),
    "shard cut in its length": cut(5),
    "shard empty": cut(0),
    "shard too long": lengthened,
    "shard missing": missing(""),
    "shard renamed": renamed("", "model-00009-of-00009.safetensors"),
    "two shards swapped": swapped_shards,
    "sidecar changed": changed("vocab.txt"),
    "config changed": changed("config.json", b"{}"),
    "card emptied": changed("README.md", b""),
    "sidecar missing": missing("vocab.txt"),
    "sidecar renamed": renamed("vocab.txt", "words.txt"),
    "file added": added("notes.txt"),
    "file added in a folder": added("code/modeling.py"),
    "shard added": added("model-00008-of-00003.safetensors"),
    "index swapped": swapped_in_the_index,
    "index not JSON": changed(INDEX, b"{"),
    "index missing": missing(INDEX),
    "table flipped": changed(TABLE),
    "table emptied": changed(TABLE, b""),
    "table not a table": changed(TABLE, b"PAR1" + bytes(500) + b"PAR1"),
    "table missing": missing(TABLE),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_the_findings_name_the_files(out: Path, damage: Damage) -> None:
    wanted = damage(out)
    assert {finding.file for finding in findings_of(out)} == wanted


RV = [sys.executable, "-c", "from rv_distributed.cli import main; main()"]


def found_by_the_command(out: Path) -> list[dict[str, Any]]:
    done = subprocess.run([*RV, "verify", out, "--json"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    findings: list[dict[str, Any]] = json.loads(done.stdout)["findings"]
    return findings


@pytest.mark.parametrize("part", [0.0, 0.1, 0.37, 0.6, 0.93, 0.999])
def test_the_command_finds_a_flipped_bit_anywhere_in_the_manifest(out: Path, part: float) -> None:
    path = out / MANIFEST
    flip(path, int(part * path.stat().st_size))
    assert MANIFEST in {finding["file"] for finding in found_by_the_command(out)}


def test_every_value_of_the_manifest_is_sealed(out: Path) -> None:
    """The formula, times and norms too, which nothing else in the folder repeats; and white space."""
    raw = (out / MANIFEST).read_bytes()
    for offset in range(0, len(raw), 13):
        (out / MANIFEST).write_bytes(raw[:offset] + bytes([raw[offset] ^ 2]) + raw[offset + 1 :])
        try:
            _, _, findings = open_output(str(out))
        except rv.VerifyError as error:
            findings = list(error.findings)
        assert [finding.file for finding in findings] == [MANIFEST], offset


@pytest.mark.parametrize("name", ["vocab.txt", "config.json", "README.md", INDEX, TABLE])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_the_command_finds_a_flipped_bit_in_a_small_file(out: Path, name: str, part: float) -> None:
    flip(out / name, int(part * (out / name).stat().st_size))
    assert {finding["file"] for finding in found_by_the_command(out)} == {name}


@pytest.mark.parametrize("offset", [0, 7, 8, 200, -1])
def test_the_command_finds_a_flipped_bit_in_a_header(out: Path, offset: int) -> None:
    """Its length, its JSON, and the spaces behind it; the range that is named holds the bit."""
    path = out / shards(out)[1]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    offset %= header
    flip(path, offset)
    (finding,) = found_by_the_command(out)
    assert (finding["file"], finding["start"]) == (path.name, 0)
    assert offset < finding["stop"] <= header


def test_the_command_finds_a_flipped_bit_in_every_tensor(out: Path) -> None:
    tensors = rv.open_checkpoint(str(out)).tensors
    for tensor in tensors.values():
        flip(out / tensor.file, (tensor.start + tensor.stop) // 2)
    findings = found_by_the_command(out)
    assert {(f["file"], f["tensor"]) for f in findings} == {(tensor.file, name) for name, tensor in tensors.items()}
    for finding in findings:
        tensor = tensors[finding["tensor"]]
        assert finding["start"] <= (tensor.start + tensor.stop) // 2 < finding["stop"]


@pytest.mark.parametrize("name", [MANIFEST, TABLE, INDEX, "shard"])
def test_a_file_that_cannot_be_read_is_named(out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = shards(out)[0] if name == "shard" else name
    read = PosixFolder.read

    def failing(self: PosixFolder, wanted: str, start: int = 0, stop: int | None = None) -> bytes:
        if wanted == name:
            raise OSError(errno.EIO, "Input/output error")
        return read(self, wanted, start, stop)

    monkeypatch.setattr(PosixFolder, "read", failing)
    with pytest.raises(rv.RunError, match=rf"/out/{name}: cannot be read: Input/output error\. Check the storage"):
        rv.verify(str(out))


def test_a_range_that_cannot_be_read_is_named_with_its_tensor(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(RangeReader, "read_cached", failing)
    with pytest.raises(rv.PieceError, match=r"safetensors, bytes \d+ to \d+ \(tensor '.*'\): cannot be read: Input"):
        rv.verify(str(out))
