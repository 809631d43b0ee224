"""A Ray cluster of one node with a job server, for the tests of rv submit, and ways to disturb it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from processes import has_ended, signal_all, tree_of

from rv_distributed.errors import UsageError
from rv_distributed.submission import Follower, JobServer, JobState

CPUS = 2


def environment() -> dict[str, str]:
    """Of the cluster and of what talks to it: this interpreter, no other cluster, no authentication."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ours = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    return {**ours, "PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextmanager
def job_cluster() -> Iterator[str]:
    """The address of a job server. It has a folder and ports of its own, and takes its processes with it."""
    gcs, dashboard, agent, client = _free_ports(4)
    folder = tempfile.mkdtemp(prefix="rv-jobs-")
    ports = {"port": gcs, "dashboard-port": dashboard, "dashboard-agent-listen-port": agent}
    options = {
        **ports,
        "ray-client-server-port": client,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "node-ip-address": "127.0.0.1",
        "num-cpus": CPUS,
        "num-gpus": 0,
        "object-store-memory": 80 << 20,
        "temp-dir": folder,
    }
    argv = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    argv += [f"--{name}={value}" for name, value in options.items()]
    with Path(folder, "head.log").open("w+") as log:
        head = subprocess.Popen(argv, stdout=log, stderr=log, env=environment())
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _wait_for(address, head, Path(log.name))
            yield address
        finally:
            # Told to end, `ray start --block` ends the processes that it started; some end a little after it.
            processes = tree_of([head.pid])
            head.terminate()
            head.wait(60)
            _end(processes)
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            JobServer(address)
            return
        except UsageError:
            if head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no cluster: {log.read_text()}") from None
            time.sleep(0.2)


def _end(processes: list[int]) -> None:
    deadline = time.monotonic() + 20
    while not all(map(has_ended, processes)):
        if time.monotonic() > deadline:
            signal_all((pid for pid in processes if not has_ended(pid)), signal.SIGKILL)
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def end_of(server: JobServer, name: str) -> tuple[list[str], JobState]:
    """The log of a job, and its state at the end."""
    follower = Follower(server, name)
    lines: list[str] = []
    while True:
        item = follower.next(120)
        if isinstance(item, JobState):
            if item.ended:
                return lines, item
        else:
            lines.append(item)


@contextmanager
def cpus_taken(server: JobServer) -> Iterator[None]:
    """While inside, no worker comes up: drivers are placed, by their memory, and wait."""
    name = server.client.submit_job(entrypoint="echo holding; exec sleep 3600", entrypoint_num_cpus=CPUS)
    follower = Follower(server, name)
    while follower.next(120) != "holding":
        pass
    try:
        yield
    finally:
        server.stop(name)
        assert end_of(server, name)[1].status == "stopped"


class Proxy:
    """Passes TCP connections on to an address, until they are cut."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._muted: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def mute(self) -> None:
        """Pass on nothing more over the connections that are open, and leave them open."""
        self._muted |= {sock for pair in self._pairs for sock in pair}

    def cut(self) -> None:
        """End the connections that are open."""
        pairs, self._pairs = self._pairs, []
        for sock in (sock for pair in pairs for sock in pair):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End all connections, and take no new ones."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            pair = (near, socket.create_connection(self._target))
            self._pairs.append(pair)
            threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        with near, far, suppress(OSError):
            while True:
                for sock in select.select([near, far], [], [])[0]:
                    received = sock.recv(65536)
                    if not received:
                        return
                    if sock not in self._muted:
                        other[sock].sendall(received)
