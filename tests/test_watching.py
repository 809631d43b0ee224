"""What a run tells of itself: the callback's shares, the progress file, events as JSON lines, the table of workers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

import rv_distributed as rv
from rv_distributed.cli.effort import effort_document, effort_table
from rv_distributed.demo import make_checkpoints
from rv_distributed.logs import JsonLines
from rv_distributed.plan import PIECE_ALIGNMENT, PlanOptions
from rv_distributed.runtime.model import PieceResult, Waited
from rv_distributed.staging import open_staging
from rv_distributed.watching import Share, Watch

SMALL = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(str(folder))
    return folder


def result(piece: int, worker: str, attempt: int = 1) -> PieceResult:
    return PieceResult(piece, (), (), 3000, 1000, Waited(0.5, 0.25, 0.125), worker, attempt)


def test_a_share_adds_up_what_a_worker_did() -> None:
    share = Share().plus(result(0, "a:1"), 2.0).plus(result(1, "a:1", attempt=2), 5.0)
    assert share == Share(2, 1, 6000, 2000, 1.0, 0.5, 0.25, 2.0, 5.0)


def test_the_progress_file_says_how_far_the_run_is_and_why_it_stopped(models: Path, tmp_path: Path) -> None:
    target, donor, reference = (str(models / role) for role in ("target", "donor", "reference"))
    path = tmp_path / ".out.rv" / "progress.json"
    begun: list[dict[str, object]] = []
    seen: list[rv.Progress] = []

    def progress(now: rv.Progress) -> None:
        seen.append(now)
        begun.append(json.loads(path.read_bytes()))
        if now.pieces == 3:
            raise RuntimeError("enough\x1b[31m")

    options = rv.RunOptions(runtime="local", workers=1)
    out = str(tmp_path / "out")
    with pytest.raises(RuntimeError):
        rv.transfer(target, donor, reference, out, plan_options=SMALL, run_options=options, progress=progress)
    assert begun[0]["state"] == "running"
    document = json.loads(path.read_bytes())
    assert (document["state"], document["why"]) == ("stopped", "RuntimeError: enough\\x1b[31m")
    assert (document["pieces"], document["pieces_kept"]) == (3, 0)
    assert document["pieces_total"] == seen[0].pieces_total > 3
    (share,) = document["workers"].values()
    assert (share["pieces"], share["bytes_written"]) == (3, document["bytes_written"])
    rv.transfer(target, donor, reference, out, plan_options=SMALL, run_options=options)
    assert not path.parent.exists()


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    place = open_staging(str(tmp_path / "out"), {}, overwrite=False, restart=False)
    place.close()
    shutil.rmtree(tmp_path / ".out.rv")
    seen: list[int] = []
    watch = Watch(
        pieces=1,
        kept=0,
        bytes_total=1000,
        places=[place],
        callback=lambda now: seen.append(now.bytes_written),
    )
    watch.add(result(0, "a:1"))
    watch.committing()
    assert seen == [1000]


def test_json_lines_carry_the_fields_and_no_secrets() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "lost %s", ("s3://id:pw@host/b",), None)
    record.fields = {"piece": 7, "cause": 'a "quoted" thing'}
    document = json.loads(JsonLines().format(record))
    assert (document["level"], document["event"]) == ("warning", "lost s3://***@host/b")
    assert (document["piece"], document["cause"]) == (7, 'a "quoted" thing')
    assert document["time"].endswith("+00:00")


def test_the_table_lists_nodes_and_their_workers() -> None:
    workers = {
        "n1:7": Share(2, 0, 6_000_000, 2_000_000, 1.0, 2.0, 1.0, 0.0, 2.0),
        "n2:9": Share(1, 1, 3_000_000, 1_000_000, 0.0, 1.0, 0.0, 0.0, 2.0),
        "n1:8": Share(1, 0, 3_000_000, 1_000_000, 3.0, 0.0, 1.0, 0.0, 2.0),
    }
    lines = [line.split() for line in effort_table(workers, 2.0)]
    assert lines[1:] == [
        ["n1", "3", "0", "9", "MB", "3", "MB", "1.5", "MB", "50%", "25%", "25%"],
        ["7", "2", "0", "6", "MB", "2", "MB", "1", "MB", "25%", "50%", "25%"],
        ["8", "1", "0", "3", "MB", "1", "MB", "500", "kB", "75%", "0%", "25%"],
        ["n2", "1", "1", "3", "MB", "1", "MB", "500", "kB", "0%", "100%", "0%"],
        ["9", "1", "1", "3", "MB", "1", "MB", "500", "kB", "0%", "100%", "0%"],
    ]
    assert [entry["worker"] for entry in effort_document(workers)] == ["n1:7", "n1:8", "n2:9"]


def test_a_run_of_one_worker_has_no_table_and_one_of_hundreds_lists_nodes() -> None:
    assert effort_table({"n1:7": Share(1)}, 1.0) == []
    many = {f"n{number % 4}:{number}": Share(1, bytes_written=10) for number in range(200)}
    assert len(effort_table(many, 1.0)) == 1 + 4
