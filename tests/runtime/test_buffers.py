"""Memory that is pinned for a GPU is let go before it is given back, so that what comes to lie there can be pinned."""

from __future__ import annotations

import gc
import mmap
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rv_distributed.recipe import Arithmetic
from rv_distributed.runtime import buffers, worker
from rv_distributed.runtime.buffers import Buffer, Bytes
from rv_distributed.runtime.model import WorkerConfig


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The addresses that are pinned just now. As CUDA, it refuses to pin one twice."""
    addresses: set[int] = set()

    def pin(array: Bytes) -> int:
        address = array.ctypes.data
        assert address not in addresses
        addresses.add(address)
        return address

    monkeypatch.setattr(buffers, "_pin", pin)
    monkeypatch.setattr(buffers, "_unpin", addresses.remove)
    return addresses


def test_a_buffer_that_grows_lets_its_old_memory_go(pinned: set[int]) -> None:
    buffer = Buffer(1 << 20, pinned=True)
    for nbytes in (1 << 20, 3 << 20, 2 << 20, 5 << 20):
        buffer.grow(nbytes)
        assert pinned == {buffer.array.ctypes.data}


def test_a_buffer_that_is_dropped_lets_its_memory_go(pinned: set[int]) -> None:
    for _ in range(20):
        buffer = Buffer(1 << 20, pinned=True)
        array = buffer.array
        assert pinned == {array.ctypes.data}
        del buffer
        gc.collect()
        assert not pinned
        array[:] = 1  # the memory itself is there as long as anyone looks at it
        del array


def test_a_stream_keeps_all_of_its_buffers_pinned(pinned: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PartComputer", lambda _config, _device: None)
    config = WorkerConfig(
        outputs=("a", "b"),
        numbers=(0, 1),
        weighted=False,
        device="cuda",
        streams=1,
        cpus=1,
        chunk_bytes=1 << 20,
        arenas=2,
        buffer_bytes=0,
        stats="full",
        arithmetic=Arithmetic("float32", "nearest", 0),
    )
    stream = worker._Stream(config, "cuda", threading.Event(), threading.Semaphore(), ThreadPoolExecutor(1))
    gc.collect()
    assert pinned == {array.ctypes.data for array in (stream._outs, *(arena.array for arena in stream._arenas))}


@pytest.mark.gpu
def test_cuda_pins_the_memory_of_one_buffer_after_another() -> None:
    for _ in range(20):
        Buffer(1 << 20, pinned=True).grow(3 << 20)
        gc.collect()


def is_populated_on_demand() -> bool:
    """Whether the system can be asked for a mapping's memory: Linux can, from 5.14 on."""
    try:
        mmap.mmap(-1, mmap.PAGESIZE).madvise(buffers._MADV_POPULATE_WRITE)
    except (AttributeError, OSError):
        return False
    return sys.platform == "linux"


@pytest.mark.skipif(not is_populated_on_demand(), reason="memory is made when it is touched")
def test_a_buffer_has_all_of_its_memory_from_the_start() -> None:
    """So a run that there is no memory for ends at once, and takes as much of it whatever it copies."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident()
    buffer = Buffer(64 << 20)
    assert resident() - before > 48 << 20
    assert not buffer.array.any()
