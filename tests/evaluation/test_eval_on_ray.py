"""Pairs as tasks of Ray: the same answers as in one process, and a worker that dies loses its own pair alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from eval_models import write_model, write_tasks

import rv_distributed as rv
from rv_distributed.evaluation import Ask, EvaluationOptions, Means, on_ray, prepare_evaluation
from rv_distributed.evaluation.job import Progress

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(600),
]
DEADLY = """
import os, sys

def text(doc):
    if "default_worker" in sys.argv[0]:
        os.kill(os.getpid(), 9)
    return doc["question"]
"""
DEADLY_ONCE = """
import os, sys

def text(doc):
    if "default_worker" in sys.argv[0] and not os.path.exists(__file__ + ".died"):
        open(__file__ + ".died", "w").close()
        os.kill(os.getpid(), 9)
    return doc["question"]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three models and tasks, and a cluster with one GPU that is none, so that pairs come one after the other."""
    import ray

    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("target", "donor", "reference")):
        write_model(folder / name, seed)
    write_tasks(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=1,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield folder
        ray.shutdown()


def evaluate(
    place: Path, out: Path, runtime: str, *tasks: str, in_memory: bool = False, **how: Any
) -> tuple[rv.Evaluation, list[Progress]]:
    options = EvaluationOptions(
        tuple(map(Ask, tasks)),
        in_memory=in_memory,
        means=Means(task_paths=(str(place / "tasks"),), batch_size="16"),
        run=rv.RunOptions(runtime=runtime, **how),  # type: ignore[arg-type]  # one of the names
    )
    vector = rv.Vector(str(place / "donor"), str(place / "reference"))
    seen: list[Progress] = []
    job = prepare_evaluation(str(place / "target"), vector, str(out), options)
    return job.run(seen.append), seen


def write_task(place: Path, name: str, code: str) -> None:
    """``tiny_text`` by another name, whose questions come from code."""
    (place / f"tasks/{name}.py").write_text(code)
    text = (place / "tasks/tiny_text.yaml").read_text().replace('"tiny_text"', f'"{name}"')
    (place / f"tasks/{name}.yaml").write_text(text.replace('"{{question}}:"', f"!function {name}.text"))


def test_both_runtimes_give_the_same_answers(place: Path, tmp_path: Path) -> None:
    here, _ = evaluate(place, tmp_path / "here", "local", "tiny_choice", in_memory=True)
    there, seen = evaluate(place, tmp_path / "there", "ray", "tiny_choice", in_memory=True, workers=1)
    assert here.outcome == there.outcome
    mine, theirs = (pq.read_table(tmp_path / out / "rv_items.parquet").to_pylist() for out in ("here", "there"))
    for one, other in zip(mine, theirs, strict=True):
        for column in ("response", "answer"):
            # With another number of threads torch adds up in another order.
            found = [[float(log) for log, _ in json.loads(row.pop(column))] for row in (one, other)]
            assert found[0] == pytest.approx(found[1], rel=1e-4)
        assert one == other
    assert [progress.done for progress in seen] == [1, 2]


def test_a_worker_that_dies_loses_its_own_pairs_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "_RETRIES", 0)
    write_task(place, "deadly", DEADLY)
    found, seen = evaluate(place, tmp_path / "out", "ray", "tiny_choice", "deadly")
    assert {row.task for row in found.outcome.rows} == {"tiny_choice"}
    assert {one.pair for one in found.failed} == {"deadly, target", "deadly, target + v"}
    assert all("died" in one.cause or "crashed" in one.cause for one in found.failed), found.failed
    assert sum(progress.mean is None for progress in seen) == 2
    assert len(list((tmp_path / "out/pairs").iterdir())) == 2


def test_a_pair_whose_worker_dies_is_tried_again(place: Path, tmp_path: Path) -> None:
    write_task(place, "deadly_once", DEADLY_ONCE)
    found, seen = evaluate(place, tmp_path / "out", "ray", "deadly_once", in_memory=True)
    assert (place / "tasks/deadly_once.py.died").exists()
    assert not found.failed
    assert [progress.done for progress in seen] == [1, 2]


def test_a_cluster_without_a_place_for_a_pair_is_not_waited_for_without_end(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "START_S", 2.0)
    with pytest.raises(
        rv.WorkerError, match=r"no node of the cluster has 64 CPU and 0 GPU to spare.*--cpus-per-worker"
    ):
        evaluate(place, tmp_path / "out", "ray", "tiny_choice", in_memory=True, device="cpu", cpus_per_worker=64)
    # What was asked for in vain does not stay behind.
    found, seen = evaluate(place, tmp_path / "out", "ray", "tiny_choice", in_memory=True)
    assert not found.failed
    assert [progress.done for progress in seen] == [1, 2]
