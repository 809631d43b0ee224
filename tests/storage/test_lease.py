"""A lease that the kernel frees, and that other machines can see to be alive, dead or taken over."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.errors import OutputError, RunError
from rv_distributed.plan import PIECE_ALIGNMENT, PlanOptions
from rv_distributed.storage import lease, objects
from rv_distributed.storage.lease import leased
from rv_distributed.storage.object_lease import leased_object
from rv_distributed.storage.protocols import TransientError

HOLD = """
import sys
from rv_distributed.storage.lease import leased
with leased(sys.argv[1], subject="out"):
    print("held", flush=True)
    sys.stdin.read()
"""

TRY = """
import sys
from rv_distributed.errors import OutputError
from rv_distributed.storage.lease import leased
try:
    with leased(sys.argv[1], subject="/models/out"):
        print("held")
except OutputError as error:
    print(error)
"""
ELSEWHERE = {"kernel": "another", "token": "theirs", "beat": 4, "host": "node-7", "pid": 31}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STILL_S", 1.0)
    monkeypatch.setattr(lease, "_LOOK_S", 0.01)
    monkeypatch.setattr(lease, "BEAT_S", 0.05)


@contextmanager
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease until its standard input closes."""
    command = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_lease_that_another_process_holds_is_refused_by_its_pid_until_that_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with holder(lock) as process:
        with (
            pytest.raises(OutputError, match=rf"^/models/out: .*process {process.pid} on "),
            leased(str(lock), subject="/models/out"),
        ):
            pytest.fail("two processes hold the lease")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with leased(str(lock), subject="/models/out"):
            assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_second_process_is_told_who_holds_the_lease_and_gets_it_later(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", TRY, str(lock)]
    with leased(str(lock), subject="out"):
        refused = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert refused.startswith(f"/models/out: another run is writing it (process {os.getpid()} on ")
    assert "Wait for it" in refused
    assert lock.read_bytes() == b""
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "held\n"


def test_a_lease_is_free_after_an_error_inside_it(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    with pytest.raises(KeyError), leased(lock, subject="out"):
        raise KeyError
    with leased(lock, subject="out"), pytest.raises(OutputError), leased(lock, subject="out"):
        pytest.fail("the lease was given twice")


def test_a_holder_beats(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with leased(str(lock), subject="out") as held:
        wait_until(lambda: json.loads(lock.read_text() or "{}").get("beat", 0) >= 2)
        held.check()


@pytest.mark.parametrize("left", [json.dumps(ELSEWHERE), '{"torn', "[]"])
def test_a_dead_machines_lease_is_taken_over_after_a_while(
    tmp_path: Path, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    lock = tmp_path / "lock"
    lock.write_text(left)
    with leased(str(lock), subject="out") as held:
        held.check()
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert "waiting 1 s for a sign of life" in caplog.text
    assert ("process 31 on node-7" in caplog.text) == ("node-7" in left)


def test_a_living_machines_lease_is_refused_where_locks_do_not_reach_over_machines(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(ELSEWHERE))
    ended = threading.Event()

    def beat() -> None:
        for number in range(5, 10_000):
            if ended.wait(0.05):
                return
            lock.write_text(json.dumps({**ELSEWHERE, "beat": number}))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(OutputError, match="out: another run is writing it"), leased(str(lock), subject="out"):
            pytest.fail("two machines hold the lease")
    finally:
        ended.set()
        thread.join()


def test_a_holder_that_was_taken_over_finds_out_and_leaves_the_file_alone(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with leased(str(lock), subject="out") as held:
        theirs = json.dumps(ELSEWHERE)
        wait_until(lambda: (lock.write_text(theirs), held.lost)[1])
        with pytest.raises(RunError, match=re.escape("out: another run (process 31 on node-7) took the place over")):
            held.check()
    assert lock.read_text() == theirs


@pytest.mark.parametrize("when", ["while pieces are made", "just before it publishes"])
def test_a_run_that_was_taken_over_publishes_nothing_and_the_other_does(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a driver that was frozen, given up, and wakes while its successor goes on with its pieces."""
    make_checkpoints(str(tmp_path))
    target, donor, reference = (str(tmp_path / role) for role in ("target", "donor", "reference"))
    out, lock = tmp_path / "out", tmp_path / ".out.rv" / "lock"
    if when == "just before it publishes":
        monkeypatch.setattr(lease, "BEAT_S", 3600)

    def take_over(now: rv.Progress) -> None:
        if now.pieces == (2 if "while" in when else now.pieces_total):
            lock.write_text(json.dumps(ELSEWHERE))
            if "while" in when:
                wait_until(lambda: any(found.lost for found in leases))

    leases: list[lease.Lease] = []
    made = lease.Lease.__init__

    def note(self: lease.Lease, *args: Any) -> None:
        leases.append(self)
        made(self, *args)

    monkeypatch.setattr(lease.Lease, "__init__", note)
    small = PlanOptions(max_shard_bytes=5_000_000, piece_bytes=PIECE_ALIGNMENT)
    how = rv.RunOptions(runtime="local", workers=1)
    with pytest.raises(rv.RunError, match="took the place over"):
        rv.transfer(target, donor, reference, str(out), plan_options=small, run_options=how, progress=take_over)
    assert not out.exists()
    assert json.loads(lock.read_text()) == ELSEWHERE
    manifest = rv.transfer(target, donor, reference, str(out), plan_options=small, run_options=how)
    assert manifest.timings.pieces_kept >= 2
    rv.verify(str(out))


class Store:
    """One object, which is not replaced in one step: HDFS has it empty while it is written."""

    def __init__(self) -> None:
        self.content: bytes | None = None
        self.down = False
        self.refused = self.puts = 0
        self.writes_slowly = False
        self.writing, self.read = threading.Event(), threading.Event()

    def put(self, key: str, data: bytes, *, only_new: bool = False) -> str:
        self._answer()
        if only_new and self.content is not None:
            raise FileExistsError(key)
        self.content = b""
        if self.writes_slowly:
            self.read.clear()
            self.writing.set()
            self.read.wait(0.3)
        self.content = data
        self.puts += 1
        return ""

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        self._answer()
        if self.content is None:
            raise FileNotFoundError(key)
        take(memoryview(self.content)[start:stop])
        self.read.set()

    def delete(self, keys: Iterable[str]) -> None:  # noqa: ARG002 - there is one
        self._answer()
        self.content = None

    def _answer(self) -> None:
        if self.down:
            self.refused += 1
            raise TransientError(errno.EIO, "the store is down")


def test_an_object_that_a_holder_is_writing_is_not_taken_for_another_s() -> None:
    store: Any = Store()
    with leased_object(store, "lock", subject="out") as held:
        store.writes_slowly = True
        for _ in range(2):
            assert store.writing.wait(60)
            held.check()
            store.writing.clear()
    assert store.content is None


def test_a_store_that_is_down_for_a_while_does_not_end_the_beat_nor_fail_who_lets_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(objects, "_LONGEST_WAIT_S", 0.01)
    store: Any = Store()
    with leased_object(store, "lock", subject="out") as held:
        store.down = True
        wait_until(lambda: store.refused >= 2)
        with pytest.raises(OSError, match="the store is down"):
            held.check()
        store.down, before = False, store.puts
        wait_until(lambda: store.puts > before)
        held.check()
        store.down = True
    assert store.content is not None


def test_who_lets_go_does_not_wait_for_a_store_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_FIRST_WAIT_S", 600.0)
    monkeypatch.setattr(objects, "_LONGEST_WAIT_S", 600.0)
    store: Any = Store()
    with leased_object(store, "lock", subject="out"):
        store.down = True
        wait_until(lambda: store.refused)
    assert store.refused <= 3, "a write and a read of the beat, and a read at the end"


def wait_until(condition: Callable[[], Any]) -> None:
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never happened")
