"""Ray's memory monitor, which kills workers of a node that runs out of memory: here one that really does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from reference import TIMED

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.plan import PIECE_ALIGNMENT, PlanOptions

GIB = 1 << 30
HOG = "import sys; held = b'x' * int(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def tight_ray() -> Iterator[None]:
    """A Ray that kills once this machine uses 3 GiB more than it does now."""
    if sys.platform != "linux":
        pytest.skip("Ray's memory monitor is for Linux")
    import ray
    from ray._private.utils import get_system_memory, get_used_memory

    total, used = get_system_memory(), get_used_memory()
    if total - used < 9 * GIB:
        pytest.skip("less than 9 GiB of memory are free")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "50")
        patch.setenv("RAY_memory_usage_threshold", f"{(used + 5 * GIB) / total:.4f}")
        quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init(address="local", num_cpus=2, object_store_memory=80 << 20, **quiet)
        try:
            yield
        finally:
            ray.shutdown()


def working_actors() -> set[int]:
    """Processes below this one that Ray has given to an actor."""
    found, todo = set(), [Path("/proc/self")]
    while todo:
        process = todo.pop()
        with suppress(OSError):
            title = (process / "cmdline").read_bytes()
            if title.startswith(b"ray::") and not title.startswith(b"ray::IDLE"):
                found.add(int(process.name))
            for children in process.glob("task/*/children"):
                todo += [Path("/proc") / pid for pid in children.read_text().split()]
    return found


@pytest.mark.usefixtures("tight_ray")
@pytest.mark.parametrize("lasting", [False, True], ids=["for a moment", "that lasts"])
def test_a_node_without_memory(tmp_path: Path, lasting: bool) -> None:
    """For a moment: other workers finish the run. If it lasts, the run ends, says why, and the next one resumes."""
    make_checkpoints(str(tmp_path / "models"))
    target, donor, reference = (str(tmp_path / "models" / role) for role in ("target", "donor", "reference"))
    small = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)

    def make(out: Path, runtime: Any, progress: rv.ProgressCallback | None = None) -> rv.Manifest:
        options = rv.RunOptions(runtime=runtime, workers=2)
        return rv.transfer(
            target, donor, reference, str(out), plan_options=small, run_options=options, progress=progress
        )

    def contents(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in TIMED}

    out = tmp_path / "ray"
    with ExitStack() as held:

        def run_out_of_memory(now: rv.Progress) -> None:
            if now.pieces != 2:
                return
            before = working_actors()
            command = [sys.executable, "-c", HOG, str(6 * GIB)]
            hog = held.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            held.callback(hog.kill)
            assert hog.stdout is not None
            assert hog.stdout.readline() == b"held\n"
            while before <= working_actors():
                pass
            if not lasting:
                held.close()

        if lasting:
            with pytest.raises(rv.WorkerError, match=r"killed due to the node running low on memory") as caught:
                make(out, "ray", run_out_of_memory)
            assert caught.value.exit_status == 1
            assert not out.exists()
        else:
            make(out, "ray", run_out_of_memory)
    if lasting:
        timings = make(out, "ray").timings
        assert 2 <= timings.pieces_kept < timings.pieces
    make(tmp_path / "local", "local")
    assert contents(out) == contents(tmp_path / "local")
