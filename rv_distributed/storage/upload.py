"""A shard that goes into an object store: in order, in parts, in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final

import numpy as np

from rv_distributed.storage.objects import PART_BYTES, PARTS_IN_FLIGHT, patiently
from rv_distributed.storage.protocols import ObjectStore, Upload

#: Most parts of an upload that stores take.
_MOST_PARTS: Final = 10_000


class ShardUpload:
    """As `ShardWriter`, of a whole shard of ``nbytes``."""

    def __init__(
        self, store: ObjectStore, path: str, key: str, nbytes: int, stop: threading.Event | None = None
    ) -> None:
        """``stop`` is as in `patiently`."""
        self.path, self._stop = path, stop
        self._store, self._key, self._nbytes = store, key, nbytes
        self._part_bytes = part_bytes(nbytes)
        self._part = bytearray(min(nbytes, self._part_bytes))
        self._spare: list[bytearray] = []
        self._filled = self._end = self._sent = 0
        self._begun: tuple[Upload, ThreadPoolExecutor] | None = None
        """None as long as there is no more than one part."""
        self._sending: deque[tuple[Future[None], bytearray]] = deque()

    def write(self, window: memoryview, offset: int) -> None:
        if offset != self._end:
            raise ValueError(f"byte {offset} of {self.path} came instead of byte {self._end}")
        data = np.frombuffer(window, np.uint8)
        self._end += len(data)
        while len(data):
            if self._filled == len(self._part):
                self._send_part()
            count = min(len(data), len(self._part) - self._filled)
            np.frombuffer(self._part, np.uint8)[self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]

    def finish(self) -> str:
        if self._end != self._nbytes:
            raise ValueError(f"{self.path} has {self._end} bytes of {self._nbytes}")
        if self._begun is None:
            data = bytes(self._part)
            return patiently(lambda: self._store.put(self._key, data), stop=self._stop)
        self._send_part()
        while self._sending:
            self._settle()
        state = patiently(self._begun[0].finish, stop=self._stop)
        self._begun[1].shutdown()
        self._begun = None
        return state

    def close(self) -> None:
        if self._begun is None:
            return
        upload, pool = self._begun
        # Waits for parts that are under way: one that arrived after the abort would stay.
        pool.shutdown(cancel_futures=True)
        with suppress(OSError):
            upload.abort()

    def _send_part(self) -> None:
        if self._begun is None:
            begin = partial(self._store.upload, self._key, self._nbytes, self._part_bytes)
            begun = patiently(begin, stop=self._stop)
            self._begun = begun, ThreadPoolExecutor(min(PARTS_IN_FLIGHT, begun.parallel), "rv-upload")
        upload, pool = self._begun
        number, part = self._sent, self._part
        data = part if self._filled == len(part) else part[: self._filled]
        self._sending.append((pool.submit(patiently, partial(upload.send, number, data), stop=self._stop), part))
        self._sent += 1
        if len(self._sending) > PARTS_IN_FLIGHT:
            self._settle()
        self._part = self._spare.pop() if self._spare else bytearray(self._part_bytes)
        self._filled = 0

    def _settle(self) -> None:
        """Wait for the oldest part, and take its memory back."""
        future, part = self._sending.popleft()
        future.result()
        self._spare.append(part)


def part_bytes(nbytes: int) -> int:
    """The size of the parts of a shard: larger than usual only where there would be too many."""
    least = -(-nbytes // _MOST_PARTS)
    step = 1 << 20
    return max(PART_BYTES, -(-least // step) * step)
