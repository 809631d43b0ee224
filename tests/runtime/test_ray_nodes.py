"""A Ray of several nodes on this machine: where workers go, nodes that come, go, freeze and die."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import throttle
from processes import has_ended, signal_all, tree_of
from reference import TIMED

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.plan import PIECE_ALIGNMENT, PlanOptions
from rv_distributed.runtime.model import WorkerShape
from rv_distributed.runtime.on_ray import RayRuntime, metrics, pool

SMALL = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)
#: Reads of 3 MiB for a piece of 1 MiB: about half a second, by each worker.
SLOW = 6e6


class World(NamedTuple):
    """A cluster whose head has no room for workers, and what runs on it."""

    cluster: Any
    models: Path
    expected: dict[str, bytes]
    rate: Path

    @contextmanager
    def nodes(self, *wanted: dict[str, Any], rate: float = 0.0) -> Iterator[list[Any]]:
        """Nodes for one test, whose workers read ``rate`` bytes a second."""
        self.rate.write_text(str(rate))
        small = {"object_store_memory": 80 << 20, "num_cpus": 1}
        added = [self.cluster.add_node(**{**small, **how}) for how in wanted]
        self.cluster.wait_for_nodes()
        try:
            yield added
        finally:
            for node in added:
                end_node(self.cluster, node)

    def run(self, out: Path, progress: Callable[[rv.Progress], None] | None = None, **how: Any) -> rv.Manifest:
        target, donor, reference = (str(self.models / role) for role in ("target", "donor", "reference"))
        options = rv.RunOptions(runtime="ray", **how)
        return rv.transfer(
            target, donor, reference, str(out), plan_options=SMALL, run_options=options, progress=progress
        )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, whose times differ."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


def processes_of(node: Any) -> list[int]:
    """The processes of a node: its raylet and all that descend from it."""
    return tree_of(info.process.pid for infos in node.all_processes.values() for info in infos)


def end_node(cluster: Any, node: Any) -> None:
    """Kill all of a node at once and reap it, so that none of its workers outlives its raylet."""
    signal_all(processes_of(node), signal.SIGKILL)
    with suppress(Exception):
        cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    import ray
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("world")
    make_checkpoints(str(folder / "models"))
    target, donor, reference = (str(folder / "models" / role) for role in ("target", "donor", "reference"))
    here = rv.RunOptions(runtime="local")
    rv.transfer(target, donor, reference, str(folder / "local"), plan_options=SMALL, run_options=here)
    rate = folder / "rate"
    rate.write_text("0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # For the processes of Ray, which pass it on to their workers.
        patch.setenv(throttle.RATE, str(rate))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(throttle.__file__).parent), *sys_path()]))
        # A dead or frozen node is found out in seconds, not in a minute.
        health = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 1000,
            "health_check_failure_threshold": 5,
        }
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20, "_system_config": health}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            ray.init(
                address=cluster.address,
                log_to_driver=False,
                logging_level="ERROR",
                runtime_env={"worker_process_setup_hook": "throttle.slow_reads"},
            )
            yield World(cluster, folder / "models", contents(folder / "local"), rate)
        finally:
            ray.shutdown()
            cluster.shutdown()


def sys_path() -> list[str]:
    return [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_LOOK_S", 0.2)


class Joined(NamedTuple):
    worker: str
    node: str


@pytest.fixture
def joined(caplog: pytest.LogCaptureFixture) -> Callable[[], list[Joined]]:
    """The workers that came up, and where."""
    caplog.set_level(logging.INFO, "rv_distributed")

    def read() -> list[Joined]:
        fields = [getattr(record, "fields", {}) for record in caplog.records]
        return [Joined(found["worker"], found["node"]) for found in fields if "node" in found]

    return read


def test_a_whole_node_that_is_killed_costs_nothing(world: World, tmp_path: Path) -> None:
    lost: list[Any] = []
    seen: list[rv.Progress] = []
    with world.nodes({}, {}, rate=SLOW) as nodes:

        def progress(now: rv.Progress) -> None:
            seen.append(now)
            if not lost:
                lost.append(nodes[0])
                end_node(world.cluster, nodes[0])

        world.run(tmp_path / "out", progress, workers=2)
    assert lost
    assert contents(tmp_path / "out") == world.expected
    assert seen[-1].pieces == seen[-1].pieces_total


@pytest.mark.slow
@pytest.mark.usefixtures("quick_looks")
def test_all_nodes_but_one_may_go_one_after_the_other(world: World, tmp_path: Path) -> None:
    with world.nodes({}, {}, {}, rate=SLOW) as nodes:
        doomed = iter(nodes[:2])

        def progress(_now: rv.Progress) -> None:
            node = next(doomed, None)
            if node is not None:
                end_node(world.cluster, node)

        world.run(tmp_path / "out", progress, workers=3)
        assert next(doomed, None) is None
    assert contents(tmp_path / "out") == world.expected


@pytest.mark.slow
@pytest.mark.usefixtures("quick_looks")
def test_a_node_that_joins_is_put_to_work(world: World, tmp_path: Path) -> None:
    more: list[Any] = []
    last: list[rv.Progress] = []
    with world.nodes({}, rate=SLOW):

        def progress(now: rv.Progress) -> None:
            last[:] = [now]
            if not more:
                more.append(world.cluster.add_node(num_cpus=1, object_store_memory=80 << 20))

        try:
            world.run(tmp_path / "out", progress)
        finally:
            for node in more:
                end_node(world.cluster, node)
    assert contents(tmp_path / "out") == world.expected
    assert len(last[0].workers) == 2
    assert all(share.pieces for share in last[0].workers.values())


@pytest.mark.slow
@pytest.mark.usefixtures("quick_looks")
def test_a_node_that_is_drained_gets_no_new_pieces(
    world: World, tmp_path: Path, joined: Callable[[], list[Joined]]
) -> None:
    import ray
    from ray.core.generated import autoscaler_pb2

    drained: list[str] = []
    then: list[int] = []
    last: list[rv.Progress] = []

    def progress(now: rv.Progress) -> None:
        last[:] = [now]
        if not drained:
            worker = next(iter(now.workers))
            drained.append(worker)
            node = {found.worker: found.node for found in joined()}[worker]
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            deadline = int((time.time() + 3600) * 1000)
            accepted, why = ray._private.worker.global_worker.gcs_client.drain_node(node, reason, "a test", deadline)
            assert accepted, why
            then.append(now.workers[worker].pieces)

    with world.nodes({}, {}, rate=SLOW):
        world.run(tmp_path / "out", progress, workers=2)
    assert contents(tmp_path / "out") == world.expected
    # It may finish what it had been given: a piece for each of its three streams, and one in waiting.
    assert last[0].workers[drained[0]].pieces <= then[0] + 4
    others = sum(share.pieces for name, share in last[0].workers.items() if name != drained[0])
    assert others >= last[0].pieces_total - then[0] - 4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("quick_looks")
def test_a_frozen_node_does_no_harm_when_it_wakes(world: World, tmp_path: Path) -> None:
    frozen: list[int] = []
    workers: list[int] = []
    with world.nodes({}, {}, rate=SLOW) as nodes:

        def progress(now: rv.Progress) -> None:
            if not frozen:
                frozen.extend(processes_of(nodes[0]))
                signal_all(frozen, signal.SIGSTOP)
            workers[:] = [int(name.rpartition(":")[2]) for name in now.workers]

        try:
            world.run(tmp_path / "out", progress, workers=2)
            assert contents(tmp_path / "out") == world.expected
        finally:
            woken = datetime.now(timezone.utc)
            signal_all(frozen, signal.SIGCONT)
        # Workers wake in the middle of a piece, and go on with it until they find out that their node was given up.
        for worker in set(workers) & set(frozen):
            wait_for_harm(nodes[0], worker, woken)
    assert contents(tmp_path / "out") == world.expected
    rv.verify(str(tmp_path / "out"))


def wait_for_harm(node: Any, worker: int, since: datetime) -> None:
    """Return once a worker has ended, or is through with a piece, well or not."""
    deadline = time.monotonic() + 240
    while not has_ended(worker) and not any(
        line["worker"].endswith(f":{worker}") and datetime.fromisoformat(line["time"]) > since for line in events(node)
    ):
        assert time.monotonic() < deadline, "a worker that woke does nothing"
        threading.Event().wait(0.1)


def events(node: Any) -> list[dict[str, Any]]:
    """What workers logged as JSON, into their logs in the session folder."""
    lines = (
        line
        for path in Path(node.get_logs_dir_path()).glob("worker-*.err")
        for line in path.read_text(errors="replace").splitlines()
    )
    return [json.loads(line) for line in lines if line.startswith('{"time"') and line.endswith("}")]


@pytest.mark.slow
def test_a_driver_that_is_killed_is_started_again_and_goes_on(world: World, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    roles = [text for role in ("target", "donor", "reference") for text in (f"--{role}", str(world.models / role))]
    # As the demo's: pieces of the command line are 64 MiB, and shards may be smaller.
    how = ["--runtime", "ray", "--address", world.cluster.address, "--max-shard-size", "1MB", "--out", str(out)]
    command = [sys.executable, "-c", "from rv_distributed.cli import main; main()", "transfer", *roles, *how]
    slow = json.dumps({"runtime_env": {"worker_process_setup_hook": "throttle.slow_reads"}})
    environment = {**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": slow}
    with world.nodes({}, {}, rate=SLOW):
        with log.open("wb") as file:
            driver = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        progress = tmp_path / ".out.rv" / "progress.json"
        try:
            while not progress.exists() or json.loads(progress.read_bytes())["pieces"] < 2:
                assert driver.poll() is None, log.read_text()
                threading.Event().wait(0.05)
        finally:
            driver.kill()
            driver.wait()
        assert not out.exists()
        again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250, check=False)
    assert again.returncode == 0, again.stderr
    assert re.search(r"^[1-9]\d* of \d+ pieces kept from an earlier run$", again.stdout, re.MULTILINE)
    rv.verify(str(out))
    rv.verify_against_inputs(str(out))


def test_workers_per_node_limits_them(world: World, tmp_path: Path, joined: Callable[[], list[Joined]]) -> None:
    with world.nodes({"num_cpus": 4}, {"num_cpus": 4}):
        world.run(tmp_path / "out", workers_per_node=1)
    assert contents(tmp_path / "out") == world.expected
    places = [found.node for found in joined()]
    assert 1 <= len(places) <= 2
    assert len(set(places)) == len(places)


def test_node_labels_choose_the_nodes(world: World, tmp_path: Path, joined: Callable[[], list[Joined]]) -> None:
    with world.nodes({}, {"labels": {"storage": "near"}}) as nodes:
        world.run(tmp_path / "out", node_labels={"storage": "near"})
        assert contents(tmp_path / "out") == world.expected
        assert {found.node for found in joined()} == {nodes[1].node_id}


def test_every_gpu_gets_a_worker(world: World, tmp_path: Path, joined: Callable[[], list[Joined]]) -> None:
    """Ray believes in these GPUs; torch does not see them, so that the workers compute on CPUs."""
    with world.nodes({"num_cpus": 8, "num_gpus": 2}, {"num_cpus": 8}):
        world.run(tmp_path / "out")
    assert contents(tmp_path / "out") == world.expected
    assert 1 <= len(joined()) <= 2
    assert len({found.node for found in joined()}) == 1


@pytest.mark.parametrize(("cpus", "chosen", "shape"), [(9, None, 4), (5, None, 2), (1, None, 1), (9, 6, 6)])
def test_a_worker_on_a_gpu_computes_on_its_share_of_the_cpus_and_asks_for_one(
    world: World, cpus: int, chosen: int | None, shape: int
) -> None:
    asked = RayRuntime(rv.RunOptions(cpus_per_worker=chosen), pieces=9)
    with world.nodes({"num_cpus": cpus, "num_gpus": 2}, {"num_cpus": 2}), asked as runtime:
        assert runtime.shape == WorkerShape(shape, has_gpu=True)
        assert (runtime.placement()["num_cpus"], runtime.placement()["num_gpus"]) == (1, 1)


def test_cpus_per_worker_makes_fewer_of_them(world: World, tmp_path: Path, joined: Callable[[], list[Joined]]) -> None:
    with world.nodes({"num_cpus": 4}):
        world.run(tmp_path / "out", cpus_per_worker=4)
    assert contents(tmp_path / "out") == world.expected
    assert len(joined()) == 1


def test_no_tensor_goes_through_the_object_store_or_the_driver(world: World, tmp_path: Path) -> None:
    import ray

    resident: list[int] = []
    stored: list[float] = []

    def progress(_now: rv.Progress) -> None:
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        stored.append(
            ray.cluster_resources()["object_store_memory"] - ray.available_resources().get("object_store_memory", 0.0)
        )

    with world.nodes({}, {}):
        manifest = world.run(tmp_path / "out", progress)
    assert manifest.totals.data_bytes > 10_000_000
    assert max(resident) - min(resident) < 4_000_000
    assert max(stored) < 1_000_000


def test_what_the_workers_count_is_exported_and_what_they_do_is_logged(world: World, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="Ray exports its metrics with ray[default]")
    with world.nodes({}) as nodes:
        manifest = world.run(tmp_path / "out")
        url = f"http://{nodes[0].node_ip_address}:{nodes[0].metrics_export_port}/metrics"
        values = wait_for_metrics(url, "ray_rv_pieces_done_total")
        timings = manifest.timings
        assert values["ray_rv_pieces_done_total"] == timings.pieces
        assert values["ray_rv_written_bytes_total"] == timings.bytes_written
        assert values["ray_rv_read_bytes_total"] == timings.bytes_read
        assert set(values) <= {f"ray_{name}_total" for name in metrics.METRIC_NAMES}
        lines = events(nodes[0])
    done = [line for line in lines if line["event"] == "piece done" and line["node"] == nodes[0].node_id]
    assert sorted(line["piece"] for line in done) == list(range(timings.pieces))
    assert {(line["level"], line["attempt"]) for line in done} == {("info", 1)}
    assert sum(line["bytes"] for line in done) == timings.bytes_written
    assert all(line["job"] and line["worker"] and line["seconds"] >= 0 for line in done)


def wait_for_metrics(url: str, name: str) -> dict[str, float]:
    """Our metrics at ``url``, once ``name`` is among them: Ray collects them every few seconds."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            found = re.findall(r"^(ray_rv_\w+)\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
            if name in dict(found):
                return {key: float(value) for key, value in found}
        threading.Event().wait(0.2)
    raise AssertionError(f"{url} never had {name}")
