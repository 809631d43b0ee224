"""Shards on their way into a store that does not always take them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing

import pytest

from rv_distributed.storage import objects
from rv_distributed.storage.objects import PART_BYTES, PARTS_IN_FLIGHT, patiently, read_all
from rv_distributed.storage.protocols import StoredObject, TransientError
from rv_distributed.storage.upload import ShardUpload, part_bytes


class Recorder:
    """Stands in for a store and its upload; ``fail`` may raise for a part."""

    def __init__(self, fail: Callable[[int], None] = lambda _: None, *, parallel: int = 4) -> None:
        self.parallel = parallel
        self.parts: dict[int, bytes] = {}
        self.events: list[str] = []
        self.most_at_once = 0
        self._now, self._fail, self._lock = 0, fail, threading.Lock()

    def upload(self, key: str, nbytes: int, part_bytes: int) -> Recorder:
        self.events.append(f"begin {key} of {nbytes} in {part_bytes}")
        return self

    def send(self, number: int, data: bytes | bytearray) -> None:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._fail(number)
            self.parts[number] = bytes(data)
        finally:
            with self._lock:
                self._now -= 1

    def finish(self) -> str:
        self.events.append("finish")
        return "state"

    def abort(self) -> None:
        self.events.append("abort")

    def put(self, key: str, data: bytes, *, only_new: bool = False) -> str:
        self.events.append(f"put {key} {only_new}")
        self.parts[0] = data
        return "state"

    def list(self, prefix: str) -> Iterator[StoredObject]:
        raise NotImplementedError(prefix)

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        raise NotImplementedError(key, start, stop, take)

    def delete(self, keys: Iterable[str]) -> None:
        raise NotImplementedError(keys)

    def abort_uploads(self, prefix: str) -> int:
        raise NotImplementedError(prefix)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "_FIRST_WAIT_S", 0.0)


@pytest.mark.parametrize("parallel", [1, 4])
def test_parts_are_sent_while_the_next_ones_are_filled_and_never_too_many(parallel: int) -> None:
    content = bytes(range(256)) * ((9 * PART_BYTES + 512) // 256)
    store = Recorder(parallel=parallel)
    with closing(ShardUpload(store, "s3://b/k", "k", len(content))) as writer:
        for start in range(0, len(content), 5_000_000):
            writer.write(memoryview(content)[start : start + 5_000_000], start)
        assert writer.finish() == "state"
    assert b"".join(store.parts[number] for number in range(10)) == content
    assert store.events == [f"begin k of {len(content)} in {PART_BYTES}", "finish"]
    assert store.most_at_once <= min(parallel, PARTS_IN_FLIGHT)


def test_a_part_that_fails_is_sent_again_from_memory_of_its_own() -> None:
    failed: list[int] = []

    def fail(number: int) -> None:
        if number % 2 and failed.count(number) < 3:
            failed.append(number)
            raise TransientError(5, "reset")

    content = bytes(4 * PART_BYTES) + b"x" * PART_BYTES
    store = Recorder(fail)
    with closing(ShardUpload(store, "s3://b/k", "k", len(content))) as writer:
        writer.write(memoryview(content), 0)
        writer.finish()
    assert b"".join(store.parts[number] for number in range(5)) == content
    assert sorted(failed) == [1, 1, 1, 3, 3, 3]


def test_a_part_that_cannot_be_sent_ends_the_shard_and_leaves_nothing() -> None:
    def fail(number: int) -> None:
        if number == 1:
            raise PermissionError(13, "denied", "s3://b/k")

    store = Recorder(fail)
    content = bytes(12 * PART_BYTES)
    with closing(ShardUpload(store, "s3://b/k", "k", len(content))) as writer:
        with pytest.raises(PermissionError):
            writer.write(memoryview(content), 0)
        assert "abort" not in store.events
    assert store.events[-1] == "abort"
    assert "finish" not in store.events


def test_what_fits_a_part_is_put_at_once() -> None:
    store = Recorder()
    with closing(ShardUpload(store, "s3://b/k", "k", 3)) as writer:
        writer.write(memoryview(b"abc"), 0)
        assert writer.finish() == "state"
    assert (store.events, store.parts) == (["put k False"], {0: b"abc"})


@pytest.mark.parametrize("nbytes", [1, PART_BYTES * 10_000, PART_BYTES * 10_000 + 1, 5 << 40])
def test_no_shard_has_more_parts_than_stores_take(nbytes: int) -> None:
    assert -(-nbytes // part_bytes(nbytes)) <= 10_000
    assert part_bytes(nbytes) >= PART_BYTES


def test_a_part_is_not_sent_again_once_the_run_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    tried: list[int] = []

    def fail(number: int) -> None:
        tried.append(number)
        stop.set()
        raise TransientError(5, "reset")

    # Longer than a test may take: only the stop ends the wait.
    for name in ("_FIRST_WAIT_S", "_LONGEST_WAIT_S"):
        monkeypatch.setattr(objects, name, 3600.0)
    store = Recorder(fail, parallel=1)
    with closing(ShardUpload(store, "s3://b/k", "k", 3 * PART_BYTES, stop)) as writer:
        writer.write(memoryview(bytes(3 * PART_BYTES)), 0)
        with pytest.raises(TransientError):
            writer.finish()
    assert set(tried) <= {0, 1, 2}
    assert len(tried) == len(set(tried))
    assert store.events[-1] == "abort"


class Cut:
    """A source of ``content`` that gives so many bytes a request and then breaks off."""

    def __init__(self, content: bytes, each: int) -> None:
        self.content, self.each = content, each
        self.asked: list[int] = []

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        assert key == "k"
        self.asked.append(start)
        part = self.content[start:stop]
        take(memoryview(part[: self.each]))
        if len(part) > self.each:
            raise TransientError(5, "cut")


def test_what_has_arrived_is_not_asked_for_again() -> None:
    source = Cut(bytes(range(100)), each=9)
    assert read_all(source, "k", 3, 98) == bytes(range(3, 98))
    assert source.asked == list(range(3, 98, 9))


def test_a_source_that_gives_nothing_is_given_up() -> None:
    source = Cut(bytes(10), each=0)
    with pytest.raises(TransientError):
        read_all(source, "k")
    assert len(source.asked) == objects._MOST_TRIES


def test_errors_that_another_try_would_not_cure_are_raised_at_once() -> None:
    tries = 0

    def denied() -> None:
        nonlocal tries
        tries += 1
        raise PermissionError(13, "denied")

    with pytest.raises(PermissionError):
        patiently(denied)
    assert tries == 1
