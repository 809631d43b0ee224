"""A library call that its caller stops, and the next one that goes on."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from refusal import make_models

import rv_distributed as rv
from rv_distributed.plan import PIECE_ALIGNMENT

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
