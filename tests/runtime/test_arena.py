"""The arena: the right bytes by every path, large reads where the storage is waited for, and no processor held then."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from rv_distributed.errors import PieceError
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.chunks import Chunk, Read
from rv_distributed.storage.objects import REQUEST_BYTES, ObjectReader
from rv_distributed.storage.ranges import ALIGNMENT, RangeReader

NBYTES = 3 << 20
CONTENT = np.random.default_rng(3).bytes(NBYTES)
#: Begins off every alignment, as tensors in a file do.
OFFSET = 1000
BLOCK = 512 << 10


def chunk_of(path: Path) -> Chunk:
    at = 5 * ALIGNMENT + OFFSET % ALIGNMENT
    return Chunk(0, NBYTES, b"", (Read(str(path), OFFSET, NBYTES - OFFSET, at),), (), at + NBYTES + ALIGNMENT)


def arena_for(path: Path) -> tuple[Arena, int, threading.Semaphore]:
    processor = threading.Semaphore(1)
    arena = Arena(4096, pinned=False, processor=processor, fetching=ThreadPoolExecutor(1))
    arena.load(chunk_of(path), ("w",))
    return arena, chunk_of(path).reads[0].at, processor


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def cached_source(source: Path) -> Path:
    with closing(RangeReader(str(source))) as reader:
        if reader.cache_fd < 0:
            pytest.skip("a file system without direct I/O, where the page cache is not asked")
    return source


def drop(path: Path, start: int = 0) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("cached_bytes", [NBYTES, 1 << 20, 0], ids=["cached", "cached in part", "not cached"])
def test_every_block_is_there_once_it_is_needed(source: Path, cached_bytes: int) -> None:
    drop(source, cached_bytes)
    arena, at, processor = arena_for(source)
    with processor:
        for done in range(0, NBYTES - OFFSET, BLOCK):
            nbytes = min(BLOCK, NBYTES - OFFSET - done)
            arena.need(at + done, nbytes)
            made = arena.array[at + done : at + done + nbytes].tobytes()
            assert made == CONTENT[OFFSET + done : OFFSET + done + nbytes]
    assert arena.bytes_read == NBYTES - OFFSET
    assert arena.array[at : at + NBYTES - OFFSET].tobytes() == CONTENT[OFFSET:]


def test_a_range_that_the_cache_may_hold_is_left_to_be_copied_to_where_its_read_begins(cached_source: Path) -> None:
    arena, at, processor = arena_for(cached_source)
    with processor:
        found = arena.at_hand([(-1, 0), (at + 100, 2 * BLOCK), (-1, 0)], [0, BLOCK, 0])
        assert found is not None
        absent, place, _ = found
        assert absent == (-1, -1, 0)
        assert place.at == -(-at // 64) * 64
        assert os.pread(place.fd, 2 * BLOCK, place.offset) == CONTENT[OFFSET + 100 :][: 2 * BLOCK]
        # What is in its place stays there, and then the rest of the read goes there, too.
        arena.need(at + 100, BLOCK)
        assert arena.at_hand([(at + 200, BLOCK // 2)], [1000]) == [(at + 200, -1, 0)]
        assert arena.at_hand([(at + 100, 2 * BLOCK)], [BLOCK]) is None


def test_ranges_that_would_get_in_each_other_s_way_are_not_at_hand(cached_source: Path) -> None:
    arena, at, processor = arena_for(cached_source)
    whole = NBYTES - OFFSET
    with processor:
        assert arena.at_hand([(at, BLOCK), (at + BLOCK, BLOCK)], [BLOCK, BLOCK]) is None
        assert arena.at_hand([(at, BLOCK), (at, BLOCK)], [BLOCK, BLOCK]) is not None
        assert arena.at_hand([(at, whole)], [whole]) is None, "it would have to be where it is: at no cache line"
        assert arena.at_hand([(at, whole)], [whole - 64]) is not None
        # Files are closed when that many others are needed.
        assert arena.at_hand([(at, BLOCK)] + [(-1, 0)] * 16, [BLOCK] + [0] * 16) is None


@pytest.mark.parametrize("cached_bytes", [NBYTES, 1 << 20, 0], ids=["cached", "cached in part", "not cached"])
@pytest.mark.parametrize("order", [range(10), range(9, -1, -1), (5, 0, 9, 1, 8, 4)], ids=["on", "back", "to and fro"])
def test_each_byte_is_read_once_in_whatever_order_ranges_are_needed(
    source: Path, cached_bytes: int, order: Sequence[int]
) -> None:
    drop(source, cached_bytes)
    arena, at, processor = arena_for(source)
    step = (NBYTES - OFFSET) // 10
    with processor:
        for number in order:
            arena.need(at + number * step, step)
            made = arena.array[at + number * step : at + (number + 1) * step].tobytes()
            assert made == CONTENT[OFFSET + number * step : OFFSET + (number + 1) * step]
        arena.need(at, 10 * step)
    assert arena.array[at : at + 10 * step].tobytes() == CONTENT[OFFSET : OFFSET + 10 * step]
    assert arena.bytes_read in (10 * step, NBYTES - OFFSET)


class Recorder:
    """Stands in for the methods of `RangeReader`; the first ``cached`` bytes of the file are in the cache."""

    def __init__(self, cached: int, processor: list[threading.Semaphore]) -> None:
        self.cached, self.processor = cached, processor
        self.calls: list[tuple[str, int, int]] = []

    def read_cached(self, _reader: RangeReader, window: memoryview, offset: int) -> int:
        self.calls.append(("cached", offset, len(window)))
        assert not self.processor[0].acquire(blocking=False), "a copy is work for a processor"
        return max(0, min(len(window), self.cached - offset))

    def read(self, _reader: RangeReader, _buffer: memoryview, _at: int, offset: int, nbytes: int) -> None:
        self.calls.append(("read", offset, nbytes))
        assert self.processor[0].acquire(blocking=False), "the processor is held while the storage is waited for"
        self.processor[0].release()


def test_what_is_not_cached_is_read_for_the_whole_chunk_at_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder: list[threading.Semaphore] = []
    recorder = Recorder(OFFSET + BLOCK + 100, holder)
    monkeypatch.setattr(RangeReader, "read_cached", lambda *args: recorder.read_cached(*args))
    monkeypatch.setattr(RangeReader, "read", lambda *args: recorder.read(*args))
    arena, at, processor = arena_for(source)
    holder.append(processor)
    with processor:
        for done in (0, BLOCK, 2 * BLOCK, 3 * BLOCK):
            arena.need(at + done, BLOCK)
        arena.need(at, BLOCK)
    rest = OFFSET + BLOCK + 100
    assert recorder.calls == [
        ("cached", OFFSET, BLOCK),
        ("cached", OFFSET + BLOCK, BLOCK),
        ("read", rest, NBYTES - rest),
    ]


def test_a_source_that_ends_too_early_is_named_and_the_processor_stays_with_its_holder(source: Path) -> None:
    arena, at, processor = arena_for(source)
    os.truncate(source, 2 << 20)
    with processor:
        with pytest.raises(PieceError, match=r"bytes 1000 to 3145728 \(tensor 'w'\): cannot be read: the file ends"):
            arena.need(at, NBYTES - OFFSET)
        assert not processor.acquire(blocking=False)


class Network:
    """A source over a network whose answers come when the test lets them."""

    def __init__(self) -> None:
        self.answer, self.asked = threading.Event(), threading.Semaphore(0)
        self.ranges: list[tuple[int, int]] = []
        self.error: OSError | None = None

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        assert key
        assert stop is not None
        self.ranges.append((start, stop))
        self.asked.release()
        assert self.answer.wait(60)
        if self.error is not None:
            raise self.error
        take(memoryview(bytes(range(start % 200, start % 200 + 1)) * (stop - start)))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(
        "rv_distributed.runtime.arena.open_reader", lambda path, stop: ObjectReader(network, path, path, stop)
    )
    return network


def remote_arena() -> tuple[Arena, threading.Semaphore]:
    processor = threading.Semaphore(1)
    return Arena(4096, pinned=False, processor=processor, fetching=ThreadPoolExecutor(8)), processor


def test_all_that_a_chunk_needs_of_a_network_is_asked_for_at_once(network: Network) -> None:
    arena, processor = remote_arena()
    large = 2 * REQUEST_BYTES + 10
    arena.load(Chunk(0, 1, b"", (Read("a", 7, 100, 0), Read("b", 5, large, 4096)), (), 4096 + large), ("w",))
    for _ in range(4):
        assert network.asked.acquire(timeout=60), "it is asked for before it is needed"
    assert sorted(network.ranges) == [
        (5, 5 + REQUEST_BYTES),
        (7, 107),
        (5 + REQUEST_BYTES, 5 + 2 * REQUEST_BYTES),
        (5 + 2 * REQUEST_BYTES, 5 + large),
    ]
    network.answer.set()
    with processor:
        arena.need(0, 100)
        assert arena.array[:100].tobytes() == bytes([7]) * 100
        arena.need(4096 + 5, 10)
        arena.need(4096 + large - 1, 1)
    assert arena.bytes_read == 100 + large


def test_while_a_network_is_waited_for_another_stream_has_the_processor(network: Network) -> None:
    arena, processor = remote_arena()
    arena.load(Chunk(0, 1, b"", (Read("a", 0, 100, 0),), (), 100), ("w",))
    came = threading.Event()

    def other() -> None:
        with processor:
            came.set()
            network.answer.set()

    with processor:
        thread = threading.Thread(target=other)
        thread.start()
        arena.need(0, 1)
    thread.join()
    assert came.is_set()


def test_an_error_of_a_network_names_file_range_and_tensor(network: Network) -> None:
    arena, processor = remote_arena()
    network.error = PermissionError(13, "access denied", "s3://b/a")
    network.answer.set()
    arena.load(Chunk(0, 1, b"", (Read("s3://b/a", 3, 100, 0),), (), 100), ("w",))
    with processor, pytest.raises(PieceError, match=r"s3://b/a, bytes 3 to 103 \(tensor 'w'\): .* access denied"):
        arena.need(0, 1)


def test_nothing_is_written_to_memory_that_was_dropped(network: Network) -> None:
    arena, _ = remote_arena()
    arena.load(Chunk(0, 1, b"", (Read("a", 7, 100, 0),), (), 100), ("w",))
    assert network.asked.acquire(timeout=60)
    dropping = threading.Thread(target=arena.drop)
    dropping.start()
    assert dropping.is_alive()
    network.answer.set()
    dropping.join(60)
    assert not dropping.is_alive()
