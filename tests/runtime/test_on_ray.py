"""The Ray runtime on a Ray of this machine: the same bytes, dead workers, and what it asks Ray for."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fp8_reference import fp8_config, random_fp8, write_fp8
from reference import TIMED, weights, write_checkpoint

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.plan import PIECE_ALIGNMENT, Piece, PieceTask, PlanOptions, task_of
from rv_distributed.runtime.model import PieceResult, WorkerConfig
from rv_distributed.runtime.on_ray import RayRuntime, pool
from rv_distributed.runtime.on_ray.pool import wait
from rv_distributed.storage.publish import preallocate

SMALL = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=6,
            num_gpus=0,
            object_store_memory=80 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(str(folder))
    return folder


def run(models: Path, out: Path, **how: Any) -> rv.Manifest:
    target, donor, reference = (str(models / role) for role in ("target", "donor", "reference"))
    options = rv.RunOptions(**how)
    return rv.transfer(target, donor, reference, str(out), alpha=0.7, plan_options=SMALL, run_options=options)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, whose times differ."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


@pytest.mark.usefixtures("cluster")
def test_both_runtimes_give_the_same_folders_for_any_number_of_workers(models: Path, tmp_path: Path) -> None:
    run(models, tmp_path / "local", runtime="local")
    expected = contents(tmp_path / "local")
    assert len(expected) == 8  # three shards, index, table, recipe, card, config, and nothing else
    for workers in (1, 2, 5):
        run(models, tmp_path / f"ray-{workers}", runtime="ray", workers=workers)
        run(models, tmp_path / f"local-{workers}", runtime="local", workers=workers)
        assert contents(tmp_path / f"ray-{workers}") == expected
        assert contents(tmp_path / f"local-{workers}") == expected


@pytest.mark.usefixtures("cluster")
def test_both_runtimes_round_stochastically_to_the_same_bytes(models: Path, tmp_path: Path) -> None:
    plan = replace(SMALL, dtype="bfloat16", rounding="stochastic", seed=5, compute_dtype="float64")
    target, donor, reference = (str(models / role) for role in ("target", "donor", "reference"))
    local, on_ray = (rv.RunOptions(runtime="local", workers=2), rv.RunOptions(runtime="ray", workers=2))
    made = []
    for name, options, seed in (("one", local, 5), ("same", on_ray, 5), ("other", local, 6)):
        out = tmp_path / name
        rv.transfer(target, donor, reference, str(out), plan_options=replace(plan, seed=seed), run_options=options)
        made.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert made[0] == made[1] != made[2]


@pytest.mark.usefixtures("cluster")
def test_both_runtimes_decode_and_requantize_to_the_same_bytes(tmp_path: Path) -> None:
    """FP8 with an adapter in, FP8 out: the scales come back with the pieces' results."""
    rng = np.random.default_rng(2)
    for role in ("target", "donor", "reference"):
        weight, scales = random_fp8(rng, (900, 1900))
        write_fp8(tmp_path / role, {"up.weight": weight, "up.weight_scale_inv": scales}, fp8_config())
    factors = {"up.lora_A.weight": weights(rng, "F32", (8, 1900)), "up.lora_B.weight": weights(rng, "F32", (900, 8))}
    write_checkpoint(tmp_path / "adapter", factors)
    (tmp_path / "adapter" / "model.safetensors").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    inputs = (str(tmp_path / "target"), f"{tmp_path / 'donor'}+{tmp_path / 'adapter'}", str(tmp_path / "reference"))
    plan = replace(SMALL, requantize=True)
    for name in ("local", "ray"):
        how = rv.RunOptions(runtime=name, workers=2)
        rv.transfer(*inputs, str(tmp_path / f"on-{name}"), plan_options=plan, run_options=how)
    made = contents(tmp_path / "on-local")
    assert contents(tmp_path / "on-ray") == made
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= made.keys()


def staged(models: Path, folder: Path, plan: PlanOptions = SMALL) -> tuple[list[PieceTask], WorkerConfig, rv.Job]:
    """Tasks and configuration of a run whose shards are ready in ``folder``."""
    target, donor, reference = (str(models / role) for role in ("target", "donor", "reference"))
    recipe = rv.Recipe("transfer", target, (rv.Vector(donor, reference),), ((0.7,),))
    job = rv.prepare(recipe, [str(folder / "out")], plan, rv.RunOptions(runtime="ray"))
    for shard in job.plan.shards:
        preallocate(str(folder / shard.name), shard.size)
    streams, chunk_bytes, arenas, buffer_bytes = job.sizing
    buffers = streams, 1, chunk_bytes, arenas, buffer_bytes
    config = WorkerConfig((str(folder),), (0,), False, "auto", *buffers, job.plan.stats, job.plan.arithmetic)
    return [task_of(job.plan, piece) for piece in job.plan.pieces], config, job


def runtime_of(job: rv.Job, *, workers: int) -> RayRuntime:
    return RayRuntime(rv.RunOptions(workers=workers), pieces=len(job.plan.pieces))


def kill_worker(result: PieceResult) -> None:
    os.kill(int(result.worker.rpartition(":")[2]), signal.SIGKILL)


@pytest.mark.usefixtures("cluster")
def test_pieces_of_a_killed_worker_are_made_again(models: Path, tmp_path: Path) -> None:
    tasks, config, job = staged(models, tmp_path)
    runtime = runtime_of(job, workers=2)
    killed, done = 0, set()
    with runtime:
        for result in runtime.run(iter(tasks), config):
            done.add(result.piece)
            if killed < 2:
                kill_worker(result)
                killed += 1
    assert killed == 2
    assert done == {task.piece.number for task in tasks}
    run(models, tmp_path / "whole", runtime="local")
    for shard in job.plan.shards:
        assert (tmp_path / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [([100] * 40, [16, 16, 8]), ([400_000] * 5, [2, 2, 1]), ([3 << 20, 1, 1, 3 << 20], [1, 2, 1]), ([], [])],
)
def test_how_many_pieces_go_in_one_call(models: Path, tmp_path: Path, sizes: list[int], groups: list[int]) -> None:
    (task, *_), _, _ = staged(models, tmp_path)
    tasks = [task._replace(piece=Piece(number, 0, 7, 7 + size)) for number, size in enumerate(sizes)]
    found = list(pool._grouped(iter(tasks)))
    assert [len(group) for group in found] == groups
    assert [each for group in found for each in group] == tasks


A_TENSOR_A_SHARD = PlanOptions(max_shard_bytes=65_000)


def make_small_tensors(folder: Path, count: int) -> None:
    """Three checkpoints whose tensors take 64 kB each."""
    rng = np.random.default_rng(3)
    for role in ("target", "donor", "reference"):
        tensors = {f"layers.{number}.weight": weights(rng, "BF16", (32_000,)) for number in range(count)}
        write_checkpoint(folder / role, tensors)


@pytest.mark.usefixtures("cluster")
def test_small_pieces_go_several_to_a_call_and_are_made_again_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 60
    make_small_tensors(tmp_path, count)
    target, donor, reference = (str(tmp_path / role) for role in ("target", "donor", "reference"))
    plan, local = A_TENSOR_A_SHARD, rv.RunOptions(runtime="local")
    rv.transfer(target, donor, reference, str(tmp_path / "local"), plan_options=plan, run_options=local)
    largest = max(path.stat().st_size for path in (tmp_path / "local").glob("*.safetensors"))
    calls: list[tuple[int, int]] = []

    def run(self: pool.Pool, tasks: Iterator[PieceTask]) -> Iterator[PieceResult]:
        for result in made(self, tasks):
            if not calls:
                kill_worker(result)
                calls.extend((len(call.tasks), call.attempt) for call in self._calls.values() if call.tasks)
            yield result

    made = pool.Pool.run
    monkeypatch.setattr(pool.Pool, "run", run)
    on_ray = rv.RunOptions(runtime="ray", workers=1)
    manifest = rv.transfer(target, donor, reference, str(tmp_path / "ray"), plan_options=plan, run_options=on_ray)
    assert manifest.timings.pieces == count
    assert {tasks for tasks, _ in calls} == {(1 << 20) // largest}
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    attempts = pq.read_table(tmp_path / "ray" / "rv_pieces.parquet").column("attempt").to_pylist()
    assert {1, 2} == set(attempts)


@pytest.mark.usefixtures("cluster")
def test_workers_may_die_as_often_as_they_like_with_pieces_in_between(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on nodes that are taken away again and again, every second time before the worker has done anything."""

    def welcome(self: pool.Pool, worker: Any, ready: Any) -> None:
        if next(lost_at_once):
            self._lose(pool._Call(worker, (), 0, 0.0), "a test")
        else:
            real(self, worker, ready)

    lost_at_once, real = cycle((True, False)), pool.Pool._welcome
    monkeypatch.setattr(pool.Pool, "_welcome", welcome)
    tasks, config, job = staged(models, tmp_path)
    # One piece at a time: of several, the same one may be the slowest each time, until it was tried too often.
    config = replace(config, streams=1)
    killed, done = 0, []
    with runtime_of(job, workers=1) as runtime:
        for result in runtime.run(iter(tasks), config):
            done.append(result)
            if len(done) % 3 == 0:
                kill_worker(result)
                killed += 1
    assert killed >= 1 + pool.MAX_ATTEMPTS
    assert sorted(result.piece for result in done) == [task.piece.number for task in tasks]
    assert {result.attempt for result in done} >= {1, 2}


class Hollow(pool.Pool):
    """A pool without actors, which shows how many it would have."""

    def _add_actor(self) -> None:
        self._workers.add(pool._Worker(None))

    def _remove(self, worker: Any) -> None:
        self._workers.remove(worker)

    def lose(self) -> None:
        """One that has done nothing yet."""
        worker = next(worker for worker in self._workers if not worker.done)
        self._lose(pool._Call(worker, (), 0, 0.0), "a test")


@pytest.mark.usefixtures("cluster")
def test_workers_that_die_at_once_are_tried_again_after_a_while_where_others_work(models: Path, tmp_path: Path) -> None:
    _, config, _ = staged(models, tmp_path)
    hollow = Hollow(config, lambda: 2, {}, pieces=99, kept=0)
    hollow._grow()
    next(iter(hollow._workers)).done = 1
    for _ in range(2 + pool.MAX_ATTEMPTS):
        assert len(hollow._workers) == 2
        hollow._deaths = 0  # as the other one finishes a piece
        hollow.lose()
    hollow._grow()
    assert len(hollow._workers) == 1
    hollow._rests_until = 0.0
    hollow._grow()
    assert len(hollow._workers) == 2


@pytest.mark.usefixtures("cluster")
def test_all_workers_of_a_cluster_that_grew_and_shrinks_may_die_together(models: Path, tmp_path: Path) -> None:
    _, config, _ = staged(models, tmp_path)
    room = [1]
    hollow = Hollow(config, lambda: room[0], {}, pieces=99, kept=0)
    hollow._grow()
    room[0] = 8
    hollow._grow()
    room[0] = 1
    for _ in range(8 + pool.MAX_ATTEMPTS - 1):
        hollow.lose()
    assert len(hollow._workers) == 1
    with pytest.raises(rv.WorkerError, match="keep dying"):
        hollow.lose()


@pytest.mark.usefixtures("cluster")
def test_pieces_of_a_frozen_worker_are_made_by_others_and_it_does_no_harm_when_it_wakes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "patience_s", lambda _task, _outputs: 2.0)
    monkeypatch.setattr(pool, "_LOOK_S", 0.5)
    tasks, config, job = staged(models, tmp_path)
    frozen: list[int] = []
    done = set()
    try:
        with runtime_of(job, workers=2) as runtime:
            for result in runtime.run(iter(tasks), config):
                done.add(result.piece)
                if not frozen:
                    frozen.append(int(result.worker.rpartition(":")[2]))
                    os.kill(frozen[0], signal.SIGSTOP)
        assert done == {task.piece.number for task in tasks}
    finally:
        for pid in frozen:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    run(models, tmp_path / "whole", runtime="local")
    for shard in job.plan.shards:
        assert (tmp_path / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


@pytest.mark.usefixtures("cluster")
def test_a_run_whose_last_pieces_are_made_on_draining_nodes_waits_for_nobody(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a cluster is scaled down at the end."""
    tasks, config, job = staged(models, tmp_path)
    config = replace(config, streams=1)
    done: set[int] = set()
    drained: set[str] = set()

    def drain(self: pool.Pool, _nodes: set[str]) -> None:
        assert len(done) < 2, "all is done, and it waits"
        # With both pieces it has all that it takes, and so never asked for a third.
        full = {worker.ready.node for worker in self._up if worker.ready and worker.calls == 2}
        drained.update(full)
        real(self, full)

    real = pool.Pool._drain
    monkeypatch.setattr(pool.Pool, "_drain", drain)
    monkeypatch.setattr(pool, "_LOOK_S", 0.0)
    # With all CPUs, so that there is no place for another.
    alone = RayRuntime(rv.RunOptions(workers=1, cpus_per_worker=6), pieces=len(job.plan.pieces))
    with alone as runtime:
        for result in runtime.run(iter(tasks[:2]), config):
            done.add(result.piece)
    assert drained
    assert done == {task.piece.number for task in tasks[:2]}


@pytest.mark.usefixtures("cluster")
def test_what_is_kept_counts_as_progress_and_gets_no_workers(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = threading.Event()

    def progress(now: rv.Progress) -> None:
        if now.pieces == now.pieces_total - 1:
            cancel.set()

    target, donor, reference = (str(models / role) for role in ("target", "donor", "reference"))
    alone, out = rv.RunOptions(runtime="local", workers=1), str(tmp_path / "out")
    how: dict[str, Any] = {"alpha": 0.7, "plan_options": SMALL, "run_options": alone}
    with pytest.raises(rv.Cancelled):
        rv.transfer(target, donor, reference, out, **how, progress=progress, cancel=cancel)
    asked: list[pool.Pool] = []
    shown: list[float] = []

    def add_actor(self: pool.Pool) -> None:
        asked.append(self)
        real(self)

    real = pool.Pool._add_actor
    monkeypatch.setattr(pool.Pool, "_add_actor", add_actor)
    monkeypatch.setattr("ray.util.metrics.Gauge.set", lambda _self, value: shown.append(value))
    monkeypatch.setattr(pool, "_LOOK_S", 0.0)
    timings = run(models, tmp_path / "out", runtime="ray", workers=4).timings
    assert timings.pieces_kept == timings.pieces - 1
    assert set(shown) == {timings.pieces_kept / timings.pieces, 1.0}
    assert shown[-1] == 1.0
    assert len(asked) == 1


@pytest.mark.usefixtures("cluster")
def test_workers_that_always_hang_end_the_run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "patience_s", lambda _task, _outputs: -1.0)
    monkeypatch.setattr(pool, "_LOOK_S", 0.0)
    tasks, config, job = staged(models, tmp_path)
    with runtime_of(job, workers=1) as runtime, pytest.raises(rv.WorkerError, match="hangs"):
        list(runtime.run(iter(tasks), config))


@pytest.mark.usefixtures("cluster")
def test_workers_that_always_die_end_the_run(models: Path, tmp_path: Path) -> None:
    tasks, config, job = staged(models, tmp_path)
    runtime = runtime_of(job, workers=1)
    results = runtime.run(iter(tasks), config)
    with runtime, pytest.raises(rv.WorkerError, match=r"died making it|keep dying"):
        deque(map(kill_worker, results))


@pytest.mark.usefixtures("cluster")
def test_a_piece_that_cannot_be_read_fails_at_once_with_its_own_error(models: Path, tmp_path: Path) -> None:
    tasks, config, job = staged(models, tmp_path)
    gone = tmp_path / job.plan.shards[0].name
    gone.unlink()
    runtime = runtime_of(job, workers=2)
    with runtime, pytest.raises(rv.PieceError) as caught:
        list(runtime.run(iter(tasks), config))
    assert caught.value.file == str(gone)
    assert caught.value.tensors


@pytest.mark.usefixtures("cluster")
def test_what_a_call_has_made_is_kept_when_its_next_piece_fails(tmp_path: Path) -> None:
    make_small_tensors(tmp_path, 12)
    tasks, config, job = staged(tmp_path, tmp_path, A_TENSOR_A_SHARD)
    assert [len(group) for group in pool._grouped(iter(tasks))] == [12]
    (tmp_path / tasks[7].shard_name).unlink()
    done: list[int] = []
    with runtime_of(job, workers=1) as runtime, pytest.raises(rv.PieceError, match=tasks[7].shard_name):
        done.extend(result.piece for result in runtime.run(iter(tasks), config))
    assert done == [task.piece.number for task in tasks[:7]]


@pytest.mark.usefixtures("cluster")
def test_cuda_is_refused_where_the_cluster_has_none(models: Path, tmp_path: Path) -> None:
    with pytest.raises(rv.UsageError, match="no GPUs"):
        run(models, tmp_path / "out", runtime="ray", device="cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("cluster")
def test_gpus_that_a_cluster_may_still_get_are_waited_for(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "START_S", 0.5)
    monkeypatch.setattr(pool, "_LOOK_S", 0.1)
    with pytest.raises(rv.WorkerError, match="no worker came up in 0 s: no node of the cluster has 1 CPU, 1 GPU and"):
        run(models, tmp_path / "out", runtime="ray", device="cuda", workers=2)
    assert not (tmp_path / "out").exists()


def test_an_unreachable_cluster_is_a_usage_error(models: Path, tmp_path: Path) -> None:
    with pytest.raises(rv.UsageError, match="job server"):
        run(models, tmp_path / "out", runtime="ray", address="http://127.0.0.1:8265")
    assert list(tmp_path.iterdir()) == []


class Endless:
    """An actor whose call never ends."""

    def run(self) -> None:
        threading.Event().wait()


@pytest.mark.usefixtures("cluster")
def test_what_a_signal_handler_raises_inside_ray_keeps_its_type() -> None:
    import ray

    def interrupt(signum: int, _frame: object) -> None:
        raise rv.Interrupted(signum)

    def send_once_main_waits() -> None:
        # The main thread waits for this one first, in a function that is called wait too.
        while not any(
            frame.name == "wait" and "ray" in Path(frame.filename).parts
            for frame in traceback.extract_stack(sys._current_frames()[main_thread])
        ):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    main_thread = threading.get_ident()
    actor = ray.remote(Endless).remote()
    before = signal.signal(signal.SIGTERM, interrupt)
    sender = threading.Thread(target=send_once_main_waits, daemon=True)
    try:
        sender.start()
        with pytest.raises(rv.Interrupted):
            wait([actor.run.remote()], 600)
    finally:
        signal.signal(signal.SIGTERM, before)
        sender.join()
        ray.kill(actor)
