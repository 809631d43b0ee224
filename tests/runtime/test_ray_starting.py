"""A Ray that the runtime starts and stops itself: what it starts, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from processes import has_ended, signal_all, tree_of

from rv_distributed.errors import UsageError
from rv_distributed.runtime.on_ray import RayRuntime, starting
from rv_distributed.runtime.select import RunOptions

#: Starts a Ray, says so, waits for a line, and stops it. It looks up now and then: a signal that comes just before a
#: read does not interrupt it.
OWN_RAY = """
import select
import signal
import sys
import ray
from rv_distributed.runtime.on_ray import RayRuntime
from rv_distributed.runtime.select import RunOptions

# Tests that run in the background of a shell are told to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
with RayRuntime(RunOptions(workers=2), pieces=2):
    print(ray.get(ray.remote(lambda: "up").remote()), flush=True)
    while not select.select([sys.stdin], [], [], 0.1)[0]:
        pass
"""


@contextmanager
def own_ray() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that has started a Ray, with all processes of its tree."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-c", OWN_RAY]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as driver:
        tree = [driver.pid]
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "up\n"
            tree = tree_of([driver.pid])
            yield driver, tree
        finally:
            signal_all([pid for pid in tree if not has_ended(pid)], signal.SIGKILL)


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def all_end(pids: list[int], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if not has_ended(pid)]:
        if time.monotonic() > deadline:
            return not left
        time.sleep(0.02)
    return True


def test_only_what_a_run_needs_is_started_and_all_of_it_is_stopped() -> None:
    with own_ray() as (driver, tree):
        commands = [command_of(pid) for pid in tree]
        assert any("raylet" in command for command in commands)
        for spared in ("dashboard/dashboard.py", "log_monitor.py", "autoscaler/_private/monitor.py"):
            assert not any(spared in command for command in commands)
        driver.communicate("stop\n", timeout=60)
        assert driver.returncode == 0
        assert all_end(tree, 10)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_running_by_a_driver_that_is_stopped(how: signal.Signals) -> None:
    with own_ray() as (driver, tree):
        agents = {pid for pid in tree if "Agent" in command_of(pid)}
        driver.send_signal(how)
        driver.wait(60)
        # After a kill, Ray's own agents live on for longer than a test should wait, whoever started that Ray.
        assert all_end([pid for pid in tree if how != signal.SIGKILL or pid not in agents], 20)


def test_ray_is_as_it_was_once_it_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    node = ray._private.node.Node
    before = {name: vars(node)[name] for name in starting._SPARED}
    # A version of Ray that has one of them under another name starts its process.
    monkeypatch.setattr(starting, "_SPARED", (*starting._SPARED, "start_what_ray_has_not"))
    environment = dict(os.environ)
    with starting.quick_start():
        assert all(vars(node)[name] is not method for name, method in before.items())
        assert ray._private.utils.get_dashboard_dependency_error() is not None
    assert {name: vars(node)[name] for name in starting._SPARED if name in vars(node)} == before
    assert dict(os.environ) == environment
    assert not hasattr(node, "start_what_ray_has_not")
    assert ray._private.utils.get_dashboard_dependency_error() is None


def test_a_ray_without_these_names_is_started_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ray._private.node, "Node")
    with starting.quick_start():
        assert not hasattr(ray._private.node, "Node")


#: Connects to the cluster at an address, and tells how that ends as rv does.
CONNECTING = """
import signal
import sys
from rv_distributed.cli.app import _interrupt, report_error
from rv_distributed.errors import RvError
from rv_distributed.runtime.on_ray import RayRuntime, runtime
from rv_distributed.runtime.select import RunOptions

signal.signal(signal.SIGINT, _interrupt)
runtime._CLUSTER_TIMEOUT_S = float(sys.argv[2])
try:
    with RayRuntime(RunOptions(address=sys.argv[1]), pieces=1):
        pass
except RvError as error:
    sys.exit(report_error(error))
"""


@contextmanager
def connecting(address: str, timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", CONNECTING, address, str(timeout_s)]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as driver:
        try:
            yield driver
        finally:
            driver.kill()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_where_nothing_listens_is_told_at_once(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
    with connecting(address, 600) as driver:
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == 2
    assert said.startswith(f"rv: no Ray cluster could be reached at {address}: ")
    assert "Connection refused" in said


def test_what_answers_the_port_alone_is_given_up() -> None:
    with socket.create_server(("", 0)) as server, connecting(f"127.0.0.1:{server.getsockname()[1]}", 0.5) as driver:
        _, said = driver.communicate(timeout=60)
    assert driver.returncode == 2
    assert "it did not answer within" in said


def test_a_signal_is_heard_while_a_cluster_does_not_answer() -> None:
    with socket.create_server(("", 0)) as server, connecting(f"127.0.0.1:{server.getsockname()[1]}", 600) as driver:
        server.settimeout(60)
        # The first connection asks the port; with the second, Ray tries to connect.
        connections = [server.accept()[0], server.accept()[0]]
        driver.send_signal(signal.SIGINT)
        _, said = driver.communicate(timeout=60)
        for connection in connections:
            connection.close()
    assert driver.returncode == 130
    assert "rv: stopped by SIGINT" in said


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (ConnectionError("Failed to connect"), "Failed to connect. A cluster that wants a token"),
        (ray.exceptions.RayError("no token was found"), "no token was found"),
    ],
    ids=["refused", "no token here"],
)
def test_a_cluster_that_refuses_is_told_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, remedy: str
) -> None:
    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as server:
        runtime = RayRuntime(RunOptions(address=f"127.0.0.1:{server.getsockname()[1]}"), pieces=1)
        with pytest.raises(UsageError, match=remedy):
            runtime.__enter__()
