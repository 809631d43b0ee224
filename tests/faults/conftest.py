"""Small checkpoints, their undisturbed outputs, and ``rv`` processes in which calls can be made to fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import numpy as np
import pytest
from reference import weights, write_checkpoint

from faults.harness import Done, Fault, Zygote, build_shim, content_of, why_no_shim

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "first": ("BF16", (1150, 1001)),
    "second": ("F32", (650_003,)),
    "third": ("F16", (999,)),
}


HITS = pytest.StashKey[Counter[str]]()


class World(NamedTuple):
    """The place of one test: three checkpoints, a folder for outputs, and what is to become of them."""

    inputs: Path
    place: Path
    """Where outputs go; below ``root`` like the inputs, so that faults can be aimed at either."""
    zygote: Zygote
    wanted: dict[str, bytes]
    """What an undisturbed run makes with alpha 0.7."""
    older: dict[str, bytes]
    """And with alpha 0.3."""

    def command(self, out: Path, *more: str | Path, alpha: str = "0.7", workers: int = 1) -> list[str | Path]:
        roles = [text for role in ("target", "donor", "reference") for text in (f"--{role}", self.inputs / role)]
        how = ["--alpha", alpha, "--max-shard-size", "2700000B", "--runtime", "local", "--workers", str(workers)]
        return ["transfer", *roles, *how, "--out", out, *more]

    def rv(self, out: Path, *more: str | Path, faults: tuple[Fault, ...] = (), alpha: str = "0.7") -> Done:
        return self.zygote.run(*self.command(out, *more, alpha=alpha), faults=faults)

    def process(self, out: Path) -> subprocess.CompletedProcess[str]:
        """The same from the shell: a process that shares nothing with the others."""
        command = [sys.executable, "-c", "from rv_distributed.cli import main; main()", *self.command(out)]
        return subprocess.run(command, capture_output=True, text=True, check=False)


def make_inputs(folder: Path) -> None:
    for number, role in enumerate(("target", "donor", "reference")):
        rng = np.random.default_rng(number)
        tensors = {name: weights(rng, dtype, shape) for name, (dtype, shape) in SHAPES.items()}
        sidecars = {"config.json": b"{}", "original/notes.txt": b"of the target"}
        write_checkpoint(folder / role, tensors, sidecars=sidecars)


class _Shared(NamedTuple):
    inputs: Path
    zygote: Zygote
    wanted: dict[str, bytes]
    older: dict[str, bytes]


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[_Shared]:
    if why := why_no_shim():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("faults")
    root = folder / "root"
    make_inputs(root / "inputs")
    with Zygote(build_shim(folder), root) as zygote:
        contents = []
        for alpha in ("0.7", "0.3"):
            world = World(root / "inputs", root, zygote, {}, {})
            done = world.rv(root / alpha, alpha=alpha)
            assert done.status == 0, done
            contents.append(content_of(root / alpha))
        yield _Shared(root / "inputs", zygote, *contents)
        request.config.stash[HITS] = zygote.hits


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how often each fault came true."""
    if hits := config.stash.get(HITS, None):
        terminalreporter.write_sep("=", "faults")
        for kind in sorted(hits):
            terminalreporter.write_line(f"{kind}: {hits[kind]}")


@pytest.fixture
def world(_shared: _Shared, request: pytest.FixtureRequest) -> Iterator[World]:
    # Not with the test's parameters in its name: faults are aimed by parts of paths.
    place = Path(mkdtemp(dir=_shared.inputs.parent, prefix=request.function.__name__ + "-"))
    yield World(_shared.inputs, place, _shared.zygote, _shared.wanted, _shared.older)
    _shared.zygote.abandon()
    shutil.rmtree(place)
