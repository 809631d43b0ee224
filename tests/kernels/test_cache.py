"""Numba's cache of machine code is a help and never a reason to fail: full, damaged, or nowhere."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMPUTE = """
import numpy as np
from rv_distributed.kernels.compiled import CompiledCombiner, RawOperand
from rv_distributed.recipe import Arithmetic, Weights

values = np.arange(16, dtype=np.float32)
out = np.zeros((1, 32), np.uint8)
combiner = CompiledCombiner(outputs=1, weighted=False, stats="full", arithmetic=Arithmetic("float32", "nearest", 0))
target, vector = RawOperand(0, "F32"), RawOperand(32, "F32")
arena = values.view(np.uint8)
(found,) = combiner.compute(
    arena, target, [(vector, None)], [Weights((0.5,))], out, 0, "F32", name="x", first=0, count=8
)
print(out.view(np.float32).tolist(), found.nonzero, found.changed)
"""
MADE = f"{[[n + (n + 8) / 2 for n in range(8)]]} 8 8\n"


def compute(cache: Path, *, file_bytes: int | None = None) -> None:
    """Compute a few elements in a process of its own; ``file_bytes``: the largest file that it may write."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    done = subprocess.run(
        [sys.executable, "-c", COMPUTE],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        preexec_fn=limit,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, MADE), done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    compute(folder)
    return folder


@pytest.mark.parametrize("suffix", [".nbi", pytest.param(".nbc", marks=pytest.mark.slow)])
def test_a_damaged_cache_is_passed_over(cache: Path, suffix: str) -> None:
    (path,) = cache.rglob(f"*{suffix}")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    try:
        compute(cache)
    finally:
        path.write_bytes(whole)


def test_a_cache_without_room_is_passed_over(tmp_path: Path) -> None:
    compute(tmp_path, file_bytes=1000)


@pytest.mark.slow
def test_a_place_that_cannot_be_made_is_passed_over() -> None:
    compute(Path("/proc/no/such/place"))
