"""Pieces that are computed and not written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rv_distributed.plan import Piece, PieceTask
from rv_distributed.recipe import Arithmetic
from rv_distributed.runtime import dry
from rv_distributed.runtime.model import WorkerConfig

CONFIG = WorkerConfig(
    outputs=("",),
    numbers=(0,),
    weighted=False,
    device="cpu",
    streams=3,
    cpus=1,
    chunk_bytes=4096,
    arenas=1,
    buffer_bytes=4096,
    stats="none",
    arithmetic=Arithmetic("float32", "nearest", 0),
)


def test_tasks_are_taken_as_results_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "DryStream", lambda *_: None)
    taken: list[int] = []

    def tasks() -> Iterator[PieceTask]:
        for number in range(50):
            taken.append(number)
            yield PieceTask(Piece(number, 0, 0, 1), "", b"", ())

    ahead = [len(taken) - done for done in dry.each_piece(tasks(), CONFIG, lambda _, task: task.piece.number)]
    assert taken == list(range(50))
    assert len(ahead) == 50
    assert max(ahead) <= 2 * CONFIG.streams
