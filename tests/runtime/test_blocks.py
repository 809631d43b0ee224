"""Several blocks at once, out of the page cache: the bytes and the measures of one block after another."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import assert_same, combined, read_checkpoint, weights, write_checkpoint

import rv_distributed as rv
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.compiled_block import CompiledBlock
from rv_distributed.storage.ranges import RangeReader

MIB = 1 << 20
NAMES = ("base", "grpo", "sft")
#: Of several blocks; of one; and behind an odd number of bytes, so that elements lie across borders.
SHAPES = {"a": ("BF16", (1500, 1001)), "b": ("F32", (700_001,)), "c": ("U8", (3,)), "d": ("F16", (999, 501))}
LOCAL = rv.RunOptions(runtime="local", workers=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number if name == "base" else 7)
        tensors = {key: weights(rng, dtype, shape) for key, (dtype, shape) in SHAPES.items()}
        if name == "grpo":
            moved = {key: weights(np.random.default_rng(9), dtype, shape) for key, (dtype, shape) in SHAPES.items()}
            tensors = {key: moved[key] if key != "c" else raw for key, raw in tensors.items()}
        write_checkpoint(folder / name, tensors)
    with closing(RangeReader(str(next((folder / "base").glob("*.safetensors"))))) as reader:
        if reader.cache_fd < 0:
            pytest.skip("a file system without direct I/O, where the page cache is not asked")
    return folder


def cached(models: Path, share: float) -> None:
    """Leave the first part of every file in the page cache."""
    for name in NAMES:
        for path in (models / name).glob("*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                file.read()
                os.posix_fadvise(file.fileno(), int(share * path.stat().st_size), 0, os.POSIX_FADV_DONTNEED)


def transferred(models: Path, out: Path, rounding: str) -> rv.Manifest:
    options = rv.PlanOptions(piece_bytes=4 * MIB, rounding=rounding)  # type: ignore[arg-type]
    base, grpo, sft = (str(models / name) for name in NAMES)
    return rv.transfer(base, grpo, sft, str(out), alpha=0.7, plan_options=options, run_options=LOCAL)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call with operands in a file, how many blocks were asked for and made."""
    calls: list[tuple[int, int]] = []
    plain: Callable[..., Any] = CompiledBlock.__call__

    def recording(*args: Any) -> Any:
        made = plain(*args)
        if any(found.fd >= 0 for found in args[2]):
            calls.append((len(args[8]), len(made)))
        return made

    monkeypatch.setattr(CompiledBlock, "__call__", recording)
    return calls


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.0], ids=["cached", "cached in part", "not cached"])
def test_blocks_at_once_make_what_single_blocks_make(
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[tuple[int, int]],
    share: float,
    rounding: str,
) -> None:
    cached(models, share)
    found = transferred(models, tmp_path / "out", rounding)
    asked, made = (sum(of) for of in zip(*sizes, strict=True))
    assert max(of for of, _ in sizes) > 2, "several blocks are asked for at once"
    assert made == asked if share == 1 else made < asked
    with monkeypatch.context() as patch:
        patch.setattr(Arena, "at_hand", lambda *_: None)
        sizes.clear()
        wanted = transferred(models, tmp_path / "one", rounding)
        assert sizes == []
    assert found.shards == wanted.shards
    assert found.totals == wanted.totals
    tables = [(tmp_path / name / "rv_tensors.parquet").read_bytes() for name in ("out", "one")]
    assert tables[0] == tables[1]
    assert found.timings.bytes_read == wanted.timings.bytes_read
    if rounding == "nearest":
        base, grpo, sft = (read_checkpoint(models / name) for name in NAMES)
        expected = {
            key: combined(base[key], [(grpo[key], sft[key])], [0.7], base[key].dtype) if key != "c" else base[key]
            for key in SHAPES
        }
        assert_same(read_checkpoint(tmp_path / "out"), expected)
