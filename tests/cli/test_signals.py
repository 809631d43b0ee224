"""SIGINT and SIGTERM: the documented status, nothing published, and a run that goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rv_distributed.demo import make_checkpoints

#: ``rv`` with a progress display that, at its second piece, has the process sent a signal: while the main
#: thread waits in the display itself, or, under Ray, once it is back in the extension module.
INTERRUPTED = """
import contextlib, os, sys, threading
import rv_distributed.cli.run as run

main_thread = threading.get_ident()

def send():
    os.kill(os.getpid(), int(os.environ["TEST_SIGNAL"]))

def send_in_wait():
    while sys._current_frames()[main_thread].f_code.co_name != "_wait":
        pass
    send()

@contextlib.contextmanager
def display(job, *, shown):
    def show(progress):
        if progress.pieces == 2 and job.runtime == "ray":
            threading.Thread(target=send_in_wait, daemon=True).start()
        elif progress.pieces == 2:
            send()
            threading.Event().wait()
    yield show

run.progress_display = display
from rv_distributed.cli import main
main()
"""


@pytest.mark.parametrize(
    ("signum", "runtime"), [(signal.SIGINT, "local"), (signal.SIGTERM, "local"), (signal.SIGTERM, "ray")]
)
def test_a_signal_stops_with_its_status_and_the_next_run_resumes(
    signum: signal.Signals, runtime: str, tmp_path: Path
) -> None:
    make_checkpoints(str(tmp_path))
    out = tmp_path / "out"
    command = ["transfer", "--max-shard-size", "1MB", "--workers", "1", "--out", str(out)]
    for role in ("target", "donor", "reference"):
        command += [f"--{role}", str(tmp_path / role)]

    def rv(script: str, *more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", script, *command, *more]
        environment = {**os.environ, "TEST_SIGNAL": str(int(signum)), "RAY_AUTH_MODE": "disabled"}
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment, check=False)

    stopped = rv(INTERRUPTED, "--runtime", runtime)
    assert stopped.returncode == 128 + signum
    assert f"stopped by {signum.name}" in stopped.stderr
    assert "run the same command again to resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not out.exists()

    plain = "from rv_distributed.cli import main; main()"
    resumed = rv(plain)
    assert resumed.returncode == 0, resumed.stderr
    assert "pieces kept from an earlier run" in resumed.stdout
    kept = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    again = rv(plain, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert kept == {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
