"""Slow storage for tests of the Ray runtime: a set-up hook for the worker processes, which import it by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

#: Environment variable with the name of a file; in it, the bytes a second that each worker may read.
RATE = "RV_TEST_READ_RATE"


def slow_reads() -> None:
    """Let this process read no faster than the file says; all of its threads together."""
    import threading

    from rv_distributed.runtime.arena import Arena

    path = os.environ.get(RATE)
    rate = float(Path(path).read_text()) if path and Path(path).exists() else 0.0
    if not rate:
        return
    plain, free = Arena.need, [time.monotonic()]
    lock = threading.Lock()

    def need(self: Arena, at: int, nbytes: int) -> None:
        before = self.bytes_read
        plain(self, at, nbytes)
        with lock:
            free[0] = max(free[0], time.monotonic()) + (self.bytes_read - before) / rate
            until = free[0]
        time.sleep(max(0.0, until - time.monotonic()))

    Arena.need = need  # type: ignore[method-assign]
    # Else compiled code would copy from the page cache, past all of this.
    Arena.at_hand = lambda *_: None  # type: ignore[method-assign]
