"""A node whose network goes away and comes back, in network namespaces of this machine. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import throttle
from processes import has_ended, signal_all, tree_of
from reference import TIMED

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.plan import PIECE_ALIGNMENT, PlanOptions

pytestmark = pytest.mark.slow
SMALL = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)
NETWORK = "10.213.77"
PORT = 6399
#: A lost node is found out in seconds, not in a minute.
HEALTH = '{"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}'

DRIVER = """
import sys
import ray
import rv_distributed as rv
from rv_distributed.plan import PIECE_ALIGNMENT, PlanOptions

address, out, *roles = sys.argv[1:]
ray.init(address=address, log_to_driver=False, runtime_env={"worker_process_setup_hook": "throttle.slow_reads"})
asked = False

def progress(now):
    global asked
    if not asked and len(now.workers) == 2:
        asked = True
        print(" ".join(name.rpartition(":")[2] for name in now.workers), flush=True)
        sys.stdin.readline()

small = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)
rv.transfer(*roles[:3], out, plan_options=small, run_options=rv.RunOptions(runtime="ray", workers=2), progress=progress)
"""


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@contextmanager
def namespaces(count: int) -> Iterator[list[str]]:
    """Network namespaces that see each other over a bridge; their names. The nth has the address ``NETWORK.n``."""
    tag = f"rv{os.getpid() % 100_000}"
    names = [f"{tag}n{number}" for number in range(1, count + 1)]
    with ExitStack() as stack:
        ip("link", "add", tag, "type", "bridge")
        stack.callback(ip, "link", "del", tag)
        ip("link", "set", tag, "up")
        for number, name in enumerate(names, 1):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            # A namespace lasts as long as a process in it; this end is taken away at once, and with it the other.
            stack.callback(ip, "link", "del", f"{name}v")
            ip("link", "set", f"{name}v", "master", tag, "up")
            ip("-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names


@contextmanager
def inside(name: str, *command: str | Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a namespace; in the end it is killed with all its descendants."""
    argv = ["ip", "netns", "exec", name, *map(str, command)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, text=True, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            signal_all(tree_of([process.pid]), signal.SIGKILL)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            threading.Thread(target=process.stdout.read, daemon=True).start()
            return
    raise AssertionError("".join(lines))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in TIMED}


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip")
def test_a_node_that_is_cut_off_and_comes_back_does_no_harm(tmp_path: Path) -> None:
    make_checkpoints(str(tmp_path / "models"))
    target, donor, reference = (str(tmp_path / "models" / role) for role in ("target", "donor", "reference"))
    here = rv.RunOptions(runtime="local")
    rv.transfer(target, donor, reference, str(tmp_path / "local"), plan_options=SMALL, run_options=here)
    rate, out = tmp_path / "rate", tmp_path / "out"
    rate.write_text("6e6")
    paths = [str(Path(throttle.__file__).parent), str(Path(rv.__file__).parent.parent)]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.pathsep.join(paths),
        throttle.RATE: str(rate),
    }
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--object-store-memory=83886080"]
    with ExitStack() as stack:
        head, one, two = stack.enter_context(namespaces(3))
        temp = tmp_path.parent / "r"  # short: sockets lie there
        first = [f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false", f"--system-config={HEALTH}"]
        command = [*ray, "--head", f"--node-ip-address={NETWORK}.1", f"--temp-dir={temp}", *first]
        wait_for(stack.enter_context(inside(head, *command, environment=environment)), "--block")
        nodes = []
        for number, name in ((2, one), (3, two)):
            command = [*ray, f"--address={NETWORK}.1:{PORT}", f"--node-ip-address={NETWORK}.{number}", "--num-cpus=1"]
            nodes.append(stack.enter_context(inside(name, *command, environment=environment)))
            wait_for(nodes[-1], "--block")
        arguments = [f"{NETWORK}.1:{PORT}", str(out), target, donor, reference]
        driver = stack.enter_context(inside(head, sys.executable, "-c", DRIVER, *arguments, environment=environment))
        assert driver.stdin is not None
        assert driver.stdout is not None
        said = []
        for line in driver.stdout:
            said.append(line)
            if line.replace(" ", "").strip().isdigit():
                break
        else:
            raise AssertionError("".join(said))
        cut_off = set(map(int, line.split())) & set(tree_of([nodes[0].pid]))
        assert cut_off
        ip("-n", one, "link", "set", "eth0", "down")
        driver.stdin.write("\n")
        driver.stdin.flush()
        rest = driver.stdout.read()
        assert driver.wait() == 0, rest
        assert not any(map(has_ended, cut_off)), "the worker that was cut off has ended, and shows nothing"
        assert contents(out) == contents(tmp_path / "local")
        ip("-n", one, "link", "set", "eth0", "up")
        until = time.monotonic() + 120
        while not all(map(has_ended, cut_off)):
            assert time.monotonic() < until, "a worker that was given up lives on"
            threading.Event().wait(0.1)
        assert contents(out) == contents(tmp_path / "local")
        rv.verify(str(out))
