"""What is kept of machine code is a help and never a reason to fail: full, damaged, or nowhere."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMPUTE = """
import logging
import sys

import numpy as np
from rv_distributed.kernels.compiled import CompiledCombiner, RawOperand
from rv_distributed.recipe import Arithmetic, Weights

logging.basicConfig(level=logging.INFO)
values = np.arange(16, dtype=np.float32)
out = np.zeros((1, 32), np.uint8)
combiner = CompiledCombiner(outputs=1, weighted=False, stats="full", arithmetic=Arithmetic("float32", "nearest", 0))
target, vector = RawOperand(0, "F32"), RawOperand(32, "F32")
arena = values.view(np.uint8)
((found,),) = combiner.compute(
    arena, target, [(vector, None)], [Weights((0.5,))], out, 0, "F32", name="x", first=0, sizes=[8]
)
print(out.view(np.float32).tolist(), found.nonzero, found.changed, "numba" in sys.modules)
"""
MADE = f"{[[n + (n + 8) / 2 for n in range(8)]]} 8 8"


def compute(cache: Path, *, compiles: bool = True, file_bytes: int | None = None) -> None:
    """Compute a few elements in a process of its own, which ``compiles`` or finds machine code; ``file_bytes``: the
    largest file that it may write."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    done = subprocess.run(
        [sys.executable, "-c", COMPUTE],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        preexec_fn=limit,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{MADE} {compiles}\n"), done.stderr
    assert ("compiling combine_blocks for this processor" in done.stderr) == compiles


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    compute(folder)
    return folder


def test_where_machine_code_is_kept_numba_is_not_imported(cache: Path) -> None:
    compute(cache, compiles=False)


@pytest.mark.parametrize(
    "keep", [pytest.param(slice(0, 100), marks=pytest.mark.slow), slice(0, -1)], ids=["its beginning", "all but a byte"]
)
def test_damaged_machine_code_is_passed_over_and_replaced(cache: Path, keep: slice) -> None:
    (path,) = cache.rglob("*.o")
    whole = path.read_bytes()
    path.write_bytes(whole[keep])
    compute(cache)
    compute(cache, compiles=False)


def test_a_cache_without_room_is_passed_over(tmp_path: Path) -> None:
    compute(tmp_path, file_bytes=1000)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_a_place_that_cannot_be_made_is_passed_over() -> None:
    compute(Path("/proc/no/such/place"))
