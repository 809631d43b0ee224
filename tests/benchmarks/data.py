"""Writing the benchmarks' checkpoints: `prepare` makes a `DataSet` of `shapes` in three roles.

`base` is random, `sft` is base plus a small dense noise, and `grpo` is sft with a fifth of its
elements moved. Values repeat after `_PERIOD_BYTES` of file, which makes them cheap; all roles repeat alike, so
the differences between roles are those of the values. A sparse data set has real headers and its full logical
size, but no values beyond a few bytes in the middle of each shard that tell its roles apart.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

import torch
from shapes import DataSet, Spec

from rv_distributed.storage.ranges import RangeWriter

ROLES: Final = ("base", "sft", "grpo")
_PERIOD_BYTES: Final = 64 << 20
_DONE: Final = "complete"
_SHARD_BYTES: Final = 4_000_000_000


class Triple(NamedTuple):
    """A prepared data set: the folder of each role."""

    base: Path
    sft: Path
    grpo: Path

    def files(self) -> list[Path]:
        """All weight files."""
        return [path for role in self for path in sorted(role.glob("*.safetensors"))]


def prepare(data: DataSet, folder: Path) -> Triple:
    """The data set's three checkpoints in ``folder/<name>``; written unless exactly these lie there already.

    Raises OSError when they do not fit the disk.
    """
    place = folder / data.name
    triple = Triple(*(place / role for role in ROLES))
    identity = sha256(json.dumps(asdict(data)).encode()).hexdigest()
    done = place / _DONE
    if done.exists() and done.read_text() == identity:
        return triple
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    free = shutil.disk_usage(place).free
    if not data.sparse and 3 * data.nbytes > free:
        raise OSError(f"{place}: {data.name} takes {3 * data.nbytes} bytes, but {free} are free")
    blocks = None if data.sparse else _blocks()
    for number, role in enumerate(triple):
        _write_checkpoint(role, data, b"%d" % number * 64, blocks[number] if blocks else None)
    done.write_text(identity)
    return triple


def _blocks() -> list[memoryview]:
    """A period of each role's values, in page-aligned memory as direct I/O wants it."""
    count = _PERIOD_BYTES // 2
    random = torch.Generator().manual_seed(0)
    base = torch.empty(count).normal_(0, 0.02, generator=random).bfloat16()
    sft = (base + torch.empty(count).normal_(0, 2e-4, generator=random)).bfloat16()
    moved = torch.empty(count).uniform_(generator=random) < 0.2
    grpo = torch.where(moved, (sft.float() * 1.01 + 1e-5).bfloat16(), sft)
    views = []
    for values in (base, sft, grpo):
        memory = mmap.mmap(-1, _PERIOD_BYTES)
        torch.frombuffer(memory, dtype=torch.bfloat16).copy_(values)
        views.append(memoryview(memory))
    return views


def _write_checkpoint(folder: Path, data: DataSet, mark: bytes, block: memoryview | None) -> None:
    folder.mkdir()
    shards = _group(data)
    total = data.nbytes
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, size = _header(specs)
        _write_shard(folder / name, header, size, mark, block)
        weight_map |= dict.fromkeys((spec.name for spec in specs), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(data.config, indent=2))


def _group(data: DataSet) -> list[list[Spec]]:
    """The tensors of each shard, in order."""
    total = data.nbytes
    count = data.shards or -(-total // _SHARD_BYTES)
    shards: list[list[Spec]] = [[] for _ in range(count)]
    before = 0
    for spec in data.tensors:
        shards[before * count // total].append(spec)
        before += spec.nbytes
    return [shard for shard in shards if shard]


def _header(specs: Sequence[Spec]) -> tuple[bytes, int]:
    """A shard's bytes before its data, padded to 8 as safetensors does, and the size of the whole file."""
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        offsets = [end, end + spec.nbytes]
        document[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": offsets}
        end += spec.nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + end


def _write_shard(path: Path, header: bytes, size: int, mark: bytes, block: memoryview | None) -> None:
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)
    if block is not None:
        writer = RangeWriter(str(path))
        for start in range(0, size, len(block)):
            writer.write(block[: min(len(block), size - start)], start)
        writer.close()
    with path.open("r+b") as file:
        file.write(header)
        if block is None:
            file.seek((len(header) + size) // 2)
            file.write(mark[: size - file.tell()])
        file.flush()
        os.fsync(file.fileno())
