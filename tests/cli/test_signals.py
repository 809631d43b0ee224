"""SIGINT, SIGTERM and SIGHUP: the documented status, nothing published, and a run that goes on where it was."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rv_distributed.demo import make_checkpoints

#: ``rv`` with a progress display that sends the process a signal at its second piece, and then waits for it.
INTERRUPTED = """
import contextlib, os, signal, threading
import rv_distributed.cli.run as run

# Tests may run under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

@contextlib.contextmanager
def display(bytes_total, log_format, *, shown):
    def show(progress):
        if progress.pieces == 2:
            os.kill(os.getpid(), int(os.environ["TEST_SIGNAL"]))
            threading.Event().wait()
    yield show

run.progress_display = display
from rv_distributed.cli import main
main()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_with_its_status_and_the_next_run_resumes(signum: signal.Signals, tmp_path: Path) -> None:
    make_checkpoints(str(tmp_path))
    out = tmp_path / "out"
    command = ["transfer", "--max-shard-size", "1MB", "--workers", "1", "--out", str(out)]
    for role in ("target", "donor", "reference"):
        command += [f"--{role}", str(tmp_path / role)]

    def rv(script: str, *more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", script, *command, *more]
        environment = {**os.environ, "TEST_SIGNAL": str(int(signum))}
        return subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment, check=False)

    stopped = rv(INTERRUPTED)
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


#: ``rv`` with a terminal of its own; it says when it has made two pieces, and waits.
ON_A_TERMINAL = """
import contextlib, os, signal, threading
import rv_distributed.cli.run as run

signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.close(os.open(os.ttyname(2), os.O_RDWR))

@contextlib.contextmanager
def display(bytes_total, log_format, *, shown):
    def show(progress):
        if progress.pieces == 2:
            print("two pieces", flush=True)
            threading.Event().wait()
    try:
        yield show
    finally:
        print("the display ends", flush=True)

run.progress_display = display
from rv_distributed.cli import main
main()
"""


def test_a_terminal_that_is_closed_ends_a_run_as_a_signal_does(tmp_path: Path) -> None:
    make_checkpoints(str(tmp_path))
    roles = [text for role in ("target", "donor", "reference") for text in (f"--{role}", str(tmp_path / role))]
    command = ["transfer", *roles, "--max-shard-size", "1MB", "--workers", "1", "--out", str(tmp_path / "out")]
    ours, its = pty.openpty()
    argv = [sys.executable, "-c", ON_A_TERMINAL, *command]
    with subprocess.Popen(argv, stdin=its, stdout=its, stderr=its, start_new_session=True) as driver:
        os.close(its)
        said = b""
        while b"two pieces" not in said:
            said += os.read(ours, 4096)
        os.close(ours)
        assert driver.wait(60) == 128 + signal.SIGHUP
    assert (tmp_path / ".out.rv").is_dir()


#: ``rv`` that is told to ignore SIGHUP, as nohup tells it, and gets one.
UNDER_NOHUP = """
import os, signal
import rv_distributed.cli.version as version

signal.signal(signal.SIGHUP, signal.SIG_IGN)
say = version.say
version.say = lambda text: (os.kill(os.getpid(), signal.SIGHUP), say(text))
from rv_distributed.cli import main
main()
"""


def test_under_nohup_a_run_goes_on() -> None:
    argv = [sys.executable, "-c", UNDER_NOHUP, "version"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


#: ``rv`` that gets a signal while it is imported.
INTERRUPTED_IMPORT = """
import os, signal, sys

class Sending:
    def find_spec(self, name, path, target=None):
        if name == "rv_distributed.cli.app":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Sending())
from rv_distributed.cli import main
main()
"""


def test_a_signal_while_rv_is_imported_prints_no_traceback() -> None:
    argv = [sys.executable, "-c", INTERRUPTED_IMPORT, "version"]
    stopped = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (-signal.SIGINT, "", "")


#: ``rv`` that gets a signal while it starts its first thread.
INTERRUPTED_START = """
import os, signal, threading
start = threading._start_new_thread

def start_and_send(*args):
    threading._start_new_thread = start
    started = start(*args)
    os.kill(os.getpid(), signal.SIGTERM)
    return started

threading._start_new_thread = start_and_send
from rv_distributed.cli import main
main()
"""


def test_a_signal_in_the_middle_of_starting_a_thread_prints_no_traceback(tmp_path: Path) -> None:
    make_checkpoints(str(tmp_path))
    roles = [text for role in ("target", "donor", "reference") for text in (f"--{role}", str(tmp_path / role))]
    argv = [sys.executable, "-c", INTERRUPTED_START, "transfer", *roles, "--out", str(tmp_path / "out")]
    stopped = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr.splitlines()[0] == "rv: stopped by SIGTERM"
    assert "Traceback" not in stopped.stderr


#: ``rv`` that gets a signal when all is done, while the interpreter ends.
INTERRUPTED_END = """
import atexit, os, signal
atexit.register(lambda: os.kill(os.getpid(), int(os.environ["TEST_SIGNAL"])))
from rv_distributed.cli import main
main()
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_ends_the_process_without_a_traceback(signum: signal.Signals) -> None:
    argv = [sys.executable, "-c", INTERRUPTED_END, "--version"]
    environment = {**os.environ, "TEST_SIGNAL": str(int(signum))}
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert ended.returncode == -signum
    assert ended.stderr == ""


#: ``rv`` that gets a signal while it compares a piece.
INTERRUPTED_DIFF = """
import os, signal
import rv_distributed.comparison.measure as measure

look = measure._look

def look_and_send(stream, task):
    os.kill(os.getpid(), signal.SIGINT)
    return look(stream, task)

measure._look = look_and_send
from rv_distributed.cli import main
main()
"""


def test_a_signal_stops_a_comparison_which_promises_no_resume(tmp_path: Path) -> None:
    make_checkpoints(str(tmp_path))
    argv = [sys.executable, "-c", INTERRUPTED_DIFF, "diff", str(tmp_path / "donor"), str(tmp_path / "target")]
    stopped = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "rv: stopped by SIGINT\n")
