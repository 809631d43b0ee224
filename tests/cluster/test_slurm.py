"""The SLURM script, run for real with both of its nodes on this machine.

``srun`` and ``scontrol`` are stand-ins; bash and, in the first test, Ray and rv are real.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_files import CLUSTER

SCRIPT = CLUSTER / "slurm" / "rv.sbatch"
PYTHON_BIN = Path(sys.executable).parent

SRUN = r"""#!/bin/bash
# Runs the command as many times as --nodes says, here; SIGTERM is passed on, as by the real one.
count=1
while [[ $1 == --* ]]; do
  case $1 in --nodes=*) count=${1#*=} ;; esac
  shift
done
steps=()
trap 'kill -TERM "${steps[@]}" 2>/dev/null' TERM
for ((i = 0; i < count; i++)); do
  "$@" &
  steps+=($!)
done
for step in "${steps[@]}"; do
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
done
"""
SCONTROL = r"""#!/bin/bash
if [ "$1" = show ]; then printf 'localhost\nlocalhost\n'; else echo "$*" >> "$CALLS"; fi
"""
# Nodes that are up as soon as they are asked for.
RAY = r"""#!/bin/bash
if [ "$1" = status ]; then printf ' 1 node_a\n 1 node_b\n'; exit; fi
trap 'kill $!' TERM
sleep 1000 &
wait
"""


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with tempfile.TemporaryDirectory(prefix="rv-", dir="/tmp") as short:  # Ray's sockets need short names
        started = Job(tmp_path, Path(short))
        yield started
        started.end()


class Job:
    """A SLURM job of two nodes, which tests give their own ray and rv."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.out = folder / "out"
        self.calls = folder / "calls"
        self.put("srun", SRUN)
        self.put("scontrol", SCONTROL)
        # The script's port is 20000 and its job's id; a free one below 30000.
        self.id = next(n for n in range(os.getpid() % 5000, 10_000) if _is_free(20_000 + n))
        self.env = os.environ | {
            "PATH": f"{self.bin}:{PYTHON_BIN}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "RAY_TMPDIR": str(ray_folder),
            "RV_OUT": str(self.out),
            "RV_MODELS": str(folder / "models"),
            "SLURM_JOB_ID": str(self.id),
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        self.process: subprocess.Popen[str] | None = None

    def put(self, name: str, script: str) -> None:
        """Make a command of this name that the job finds first."""
        path = self.bin / name
        path.write_text(script)
        path.chmod(0o755)

    def start(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            ["bash", SCRIPT],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self.process

    def run(self) -> tuple[int, str]:
        """The job's exit status, and what it printed."""
        process = self.start()
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def end(self) -> None:
        """Whatever a failed test left: the job has a session of its own."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_two_nodes_make_the_output(job: Job, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    subprocess.run([PYTHON_BIN / "rv", "demo", "--out", demo], check=True, capture_output=True)
    (tmp_path / "models").mkdir()
    for name, made in {"instruct": "target", "grpo": "donor", "sft": "reference"}.items():
        (tmp_path / "models" / name).symlink_to(demo / made)
    status, output = job.run()
    assert status == 0, output
    assert (job.out / "rv_manifest.json").is_file()
    # rv demo makes the same sum.
    expected = (demo / "transferred" / "model.safetensors").read_bytes()
    assert (job.out / "model.safetensors").read_bytes() == expected
    assert not job.calls.exists()


@pytest.mark.parametrize(
    ("rv", "expected"), [("exit 7", 7), ("exit 0", 1), ('mkdir "$RV_OUT"; touch "$RV_OUT"/rv_manifest.json', 0)]
)
def test_status_is_the_drivers_and_the_marker_counts(job: Job, rv: str, expected: int) -> None:
    job.put("ray", RAY)
    job.put("rv", f"#!/bin/bash\n{rv}\n")
    status, output = job.run()
    assert status == expected, output
    assert not job.calls.exists()


@pytest.mark.parametrize(("restarts", "requeued"), [("0", True), ("10", False)])
def test_a_stopped_job_waits_for_rv_and_queues_again(job: Job, restarts: str, requeued: bool) -> None:
    job.put("ray", RAY)
    job.put("rv", "#!/bin/bash\ntrap 'kill $!; sleep 0.2; exit 143' TERM\nsleep 1000 & echo running; wait\n")
    job.env["SLURM_RESTART_COUNT"] = restarts
    process = job.start()
    assert process.stdout
    assert process.stdout.readline() == "running\n"
    # As --signal=B:TERM does: to the script alone.
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert job.calls.exists() == requeued
    if requeued:
        assert job.calls.read_text() == f"requeue {job.id}\n"


def test_ray_that_does_not_start_is_a_failure(job: Job) -> None:
    job.put("ray", "#!/bin/bash\nexit 1\n")
    job.put("rv", "#!/bin/bash\nexit 0\n")
    status, output = job.run()
    assert status == 1
    assert "0 of 1 Ray nodes are up" in output
