"""A Ray of several nodes on this machine, and a node that is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.plan import PIECE_ALIGNMENT, PlanOptions


@pytest.fixture
def nodes() -> Iterator[Any]:
    """A cluster whose head has no room for workers, and two nodes that have."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        small = {"object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        try:
            cluster.nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_a_run_outlives_a_node(nodes: Any, tmp_path: Path) -> None:
    make_checkpoints(str(tmp_path / "models"))
    target, donor, reference = (str(tmp_path / "models" / role) for role in ("target", "donor", "reference"))
    small = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)
    lost: list[Any] = []

    def progress(_now: rv.Progress) -> None:
        if not lost:
            lost.append(nodes.nodes[0])
            nodes.remove_node(lost[0], allow_graceful=False)

    def make(out: str, runtime: Any) -> dict[str, bytes]:
        options = rv.RunOptions(runtime=runtime, workers=2)
        watch = progress if runtime == "ray" else None
        rv.transfer(target, donor, reference, out, plan_options=small, run_options=options, progress=watch)
        return {name: (Path(out) / name).read_bytes() for name in os.listdir(out) if name != "rv_manifest.json"}

    assert make(str(tmp_path / "ray"), "ray") == make(str(tmp_path / "local"), "local")
    assert lost
