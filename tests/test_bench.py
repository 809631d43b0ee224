"""Measuring storage: figures that make sense, kept by file system, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusal import run_rv

from rv_distributed import OutputError, bench
from rv_distributed.bench import StorageSpeed, known_speed, measure_storage
from rv_distributed.runtime import select


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_measurement_is_kept_for_the_file_system_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "LEAST_KEPT_BYTES", 8 << 20)
    folder = tmp_path / "models"
    folder.mkdir()
    assert known_speed(str(folder)) is None
    speed = measure_storage(str(folder), 9 << 20)
    assert min(speed.write, speed.read, speed.cached_read, speed.mixed) > 0
    assert list(folder.iterdir()) == []
    assert known_speed(str(tmp_path)) == speed
    measure_storage(str(folder), 4 << 20)
    assert known_speed(str(tmp_path)) == speed, "too little to go by"


def test_that_a_measurement_is_of_too_little_is_said(tmp_path: Path) -> None:
    done = run_rv("bench", tmp_path, "--size", "4MiB")
    assert (done.status, "warning: --size 4MiB is too little to go by" in done.stderr) == (0, True)


@pytest.mark.parametrize(("cpus", "has_gpu", "threads"), [(2, False, 6), (64, False, 24), (16, True, 6)])
def test_it_is_measured_with_the_threads_of_a_run(
    cpus: int, has_gpu: bool, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(select, "may_have_gpus", lambda: has_gpu)
    made: list[memoryview] = []
    chunk = bench._random_chunk

    def counted() -> memoryview:
        made.append(chunk())
        return made[-1]

    monkeypatch.setattr(bench, "_random_chunk", counted)
    measure_storage(str(tmp_path), 1 << 20)
    assert len(made) == 5 * threads, "one a thread in three measurements, two in the one that reads and writes"


def test_an_unreadable_cache_is_no_measurement(tmp_path: Path) -> None:
    for text in ("", "[]", "{", json.dumps({str(tmp_path.stat().st_dev): {"write": 1.0}})):
        path = tmp_path / "cache" / "rv_distributed" / "storage.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        assert known_speed(str(tmp_path)) is None


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="missing: cannot be measured"):
        measure_storage(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("nread", "nwritten", "seconds"),
    [(300, 0, 3.0), (0, 100, 2.0), (300, 100, 8.0), (30, 1000, 20.6)],
    ids=["reading", "writing", "both", "mostly writing"],
)
def test_a_prediction_adds_what_is_moved_at_once_and_what_is_left(nread: int, nwritten: int, seconds: float) -> None:
    speed = StorageSpeed(write=50.0, read=100.0, cached_read=1e9, mixed=50.0)
    assert speed.predict_s(nread, nwritten) == pytest.approx(seconds)
