"""A library call that its caller stops, and the next one that goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from refusal import make_models

import rv_distributed as rv
from rv_distributed.plan import PIECE_ALIGNMENT
from rv_distributed.storage import objects
from rv_distributed.storage.objects import ObjectReader
from rv_distributed.storage.protocols import TransientError

HOW = rv.RunOptions(runtime="local", workers=1)
SMALL = rv.PlanOptions(piece_bytes=PIECE_ALIGNMENT, max_shard_bytes=100)


def test_a_cancelled_call_keeps_what_is_finished_and_the_next_one_resumes(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    target, donor, reference = (str(models / role) for role in ("target", "donor", "reference"))
    cancel, seen = threading.Event(), list[rv.Progress]()

    def progress(now: rv.Progress) -> None:
        seen.append(now)
        cancel.set()

    with pytest.raises(rv.Cancelled, match="same call resumes"):
        rv.transfer(
            *(target, donor, reference, str(tmp_path / "out")),
            plan_options=SMALL,
            run_options=HOW,
            progress=progress,
            cancel=cancel,
        )
    assert len(seen) == 1
    assert not (tmp_path / "out").exists()
    manifest = rv.transfer(target, donor, reference, str(tmp_path / "out"), plan_options=SMALL, run_options=HOW)
    assert manifest.timings.pieces_kept == 1 < manifest.timings.pieces


def test_a_call_that_is_cancelled_before_it_begins_makes_nothing(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(rv.Cancelled):
        rv.extract(
            str(models / "donor"), str(models / "reference"), str(tmp_path / "out"), run_options=HOW, cancel=cancel
        )
    assert not (tmp_path / "out").exists()


class Outage:
    """A store that answers for the first place that it is asked for, and for no other."""

    def __init__(self) -> None:
        self.began, self._only = threading.Event(), list[int]()
        self._lock = threading.Lock()

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        with self._lock:
            self._only = self._only or [start]
        if start not in self._only:
            self.began.set()
            raise TransientError(5, "the store is away", key)
        take(memoryview(Path(key).read_bytes()[start:stop]))


def test_a_call_that_is_cancelled_does_not_wait_for_a_store_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, store, cancel = make_models(tmp_path / "models"), Outage(), threading.Event()
    monkeypatch.setattr(
        "rv_distributed.runtime.arena.open_reader", lambda path, *stop: ObjectReader(store, path, path, *stop)
    )
    # Longer than a test may take: only the stop ends the wait.
    for name in ("_FIRST_WAIT_S", "_LONGEST_WAIT_S"):
        monkeypatch.setattr(objects, name, 3600.0)

    def progress(_now: rv.Progress) -> None:
        assert store.began.wait(60)
        cancel.set()

    target, donor, reference = (str(models / role) for role in ("target", "donor", "reference"))
    with pytest.raises(rv.Cancelled):
        rv.transfer(
            *(target, donor, reference, str(tmp_path / "out")),
            plan_options=SMALL,
            run_options=rv.RunOptions(runtime="local", workers=2),
            progress=progress,
            cancel=cancel,
        )
