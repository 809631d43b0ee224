"""What the rows of the benchmarks share: sizes, goals, figures, and the place where they work.

`__main__` makes one `Bench`; each row of `rows` takes its data, its turns and its clean-up from there and
gives back `Figure`s.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import data
import measure
import shapes
from measure import CacheState

from rv_distributed.verification import verify

SizeName = Literal["toy", "quick", "full"]


class Goal(NamedTuple):
    """What a figure should reach."""

    relation: Literal["≤", "≥"]
    limit: float
    unit: str

    def holds(self, value: float) -> bool:
        return value <= self.limit if self.relation == "≤" else value >= self.limit


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table."""

    row: str
    """The row that measured it."""
    what: str
    value: float
    unit: str
    goal: Goal | None
    """None for what is only told."""
    detail: str
    """The figures behind the value, in words."""
    raw: Mapping[str, Sequence[float]]
    """Everything that was measured, by side and in order."""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a suite is."""

    name: SizeName
    repeats: int
    model: shapes.DataSet
    layers: shapes.DataSet
    """Layers of the 7B model."""
    memory: tuple[shapes.DataSet, ...]
    """What peak memory must not depend on."""
    plan: shapes.DataSet
    pieces: shapes.DataSet
    """A tensor for each piece to schedule."""
    slow: shapes.DataSet
    """For workers with slow storage; of them there are as many as ``workers`` says."""
    workers: tuple[int, ...]
    seconds: float
    """How long all of them are watched at work."""


def size_of(name: SizeName, repeats: int | None = None) -> Size:
    """toy: seconds, for CI; quick: smaller models, three rounds; full: the models that the goals are stated for."""
    half, small = shapes.decoder("qwen2.5-0.5b"), shapes.decoder("qwen2.5-1.5b")
    memory: tuple[shapes.DataSet, ...]
    if name == "toy":
        toy, plan = shapes.decoder("toy"), shapes.deepseek("deepseek-toy", shapes.TOY_EXPERTS)
        memory, slow = (toy, shapes.one_tensor(8 << 20)), shapes.one_tensor(48 << 20)
        return Size(name, repeats or 1, toy, toy, memory, plan, shapes.pieces(24), slow, (1, 2), 0.5)
    if name == "quick":
        layers, tensor = shapes.decoder("qwen2.5-7b", 3), shapes.one_tensor(2_000_000_000)
        memory = (half, layers, tensor)
        return Size(
            name, repeats or 3, half, layers, memory, shapes.deepseek(), shapes.pieces(1000), half, (1, 2, 4), 5.0
        )
    layers, tensor = shapes.decoder("qwen2.5-7b", 16), shapes.one_tensor(8_000_000_000)
    memory = (small, layers, half, tensor)
    return Size(
        name, repeats or 5, small, layers, memory, shapes.deepseek(), shapes.pieces(5000), small, (1, 2, 4, 8), 10.0
    )


@dataclass(frozen=True, slots=True)
class Bench:
    """Where the suite works, and what it does the same way for every row."""

    work: Path
    size: Size
    mergekit: Path
    """Virtual environment of mergekit; made when it is needed and not there."""
    check: bool
    """Verify each output of ours before it is deleted."""
    verified: list[str] = field(default_factory=list)
    """The row of each output that was verified."""

    def triple(self, shape: shapes.DataSet) -> data.Triple:
        """The data set, prepared."""
        return data.prepare(shape, self.work / "data")

    @property
    def ours(self) -> Path:
        """Where commands of ours write: this path, or names that begin with it."""
        return self.work / "out" / "rv"

    @property
    def theirs(self) -> Path:
        """Where a peer writes."""
        return self.work / "out" / "peer"

    def clear(self) -> None:
        """Delete all outputs, and wait for what is still on its way to the disk."""
        shutil.rmtree(self.work / "out", ignore_errors=True)
        self.ours.parent.mkdir(parents=True)
        os.sync()

    def verify(self, row: str) -> None:
        """Verify what commands of ours have written, where that is asked for. Raises VerifyError."""
        if self.check:
            for path in self.ours.parent.glob(f"{self.ours.name}*"):
                verify(str(path))
                self.verified.append(row)

    def in_turn(
        self, row: str, files: Sequence[Path], state: CacheState, sides: Mapping[str, Callable[[], float]]
    ) -> dict[str, list[float]]:
        """As `measure.in_turn`, with ``files`` warm or cold before each run and no outputs left after it."""

        def before() -> None:
            self.clear()
            (measure.warm if state == "warm" else measure.cold)(files)

        def after() -> None:
            self.verify(row)
            self.clear()

        return measure.in_turn(sides, repeats=self.size.repeats, before=before, after=after)
