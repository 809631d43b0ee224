"""Reads and writes of byte ranges at the storage's speed, for the workers.

Input that lies in the page cache is copied from there; input that does not is read around the cache with
direct I/O, and output is written around it, so that a run neither waits for the kernel's read-ahead and
write-back nor pushes everything else out of memory. Where the system or the file system has no direct I/O,
the same calls fall back to ordinary reads and writes.

A reader or writer belongs to one thread at a time.
"""

from __future__ import annotations

import errno
import os
from typing import Final

#: Direct I/O wants file offsets, lengths and memory addresses in multiples of this.
ALIGNMENT: Final = 4096
#: Below this size direct reads cost more in latency than the cache costs in copies.
DIRECT_MIN_BYTES: Final = 256 * 1024

_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
_RWF_NOWAIT: Final[int] = getattr(os, "RWF_NOWAIT", 0)


class RangeReader:
    """As `Reader`, of one file."""

    is_remote: Final = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct_fd = _open_direct(path, os.O_RDONLY)
        # Without direct I/O there is no second way to read, so asking the cache first gains nothing.
        self._ask_cache = bool(_RWF_NOWAIT) and self._direct_fd is not None

    @property
    def cache_fd(self) -> int:
        return self._fd if self._ask_cache else -1

    def read(self, buffer: memoryview, at: int, offset: int, nbytes: int) -> None:
        """Read file bytes ``offset`` to ``offset + nbytes`` into ``buffer[at:]``.

        Large reads whose ``at`` and ``offset`` agree modulo `ALIGNMENT` may go direct: ``buffer`` has to begin
        at a page and to hold the last aligned block whole, and the rest of the aligned blocks that are
        touched may be scribbled over. Raises OSError, also when the file is too short.
        """
        done = self.read_cached(buffer[at : at + nbytes], offset)
        if done == nbytes:
            return
        direct = nbytes - done >= DIRECT_MIN_BYTES and (at - offset) % ALIGNMENT == 0
        if self._direct_fd is None or not direct:
            _read_fully(self._fd, buffer[at + done : at + nbytes], offset + done, nbytes - done, self.path)
            return
        start = (offset + done) // ALIGNMENT * ALIGNMENT
        stop = -(-(offset + nbytes) // ALIGNMENT) * ALIGNMENT
        window = buffer[at + start - offset : at + stop - offset]
        _read_fully(self._direct_fd, window, start, offset + nbytes - start, self.path)

    def read_cached(self, window: memoryview, offset: int) -> int:
        """Copy what the page cache holds of file bytes from ``offset`` on, up to the first that it does not, and wait
        for nothing; the number of bytes copied. Raises OSError."""
        done = 0
        try:
            while self._ask_cache and done < len(window):
                count = os.preadv(self._fd, [window[done:]], offset + done, _RWF_NOWAIT)
                if count == 0:
                    break
                done += count
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._ask_cache = False
        return done

    def close(self) -> None:
        os.close(self._fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)


class RangeWriter:
    """As `ShardWriter`: ranges of one existing file of full size, in any order."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._direct_fd = _open_direct(path, os.O_WRONLY)
        self._unsynced = False

    def write(self, window: memoryview, offset: int) -> None:
        """Write ``window``, which begins at a page of memory, at ``offset``. Raises OSError."""
        aligned = 0
        if self._direct_fd is not None and offset % ALIGNMENT == 0:
            aligned = len(window) // ALIGNMENT * ALIGNMENT
            _write_fully(self._direct_fd, window[:aligned], offset)
        if aligned < len(window):
            _write_fully(self._fd, window[aligned:], offset + aligned)
            self._unsynced = True

    def finish(self) -> str:
        """Return once what went through the cache is on the device. What went around it is there already, but
        for the device's own cache and the file's metadata, which a final fsync of the file covers."""
        if self._unsynced:
            os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
            if self._direct_fd is None and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced = False
        return ""

    def close(self) -> None:
        os.close(self._fd)
        if self._direct_fd is not None:
            os.close(self._direct_fd)


def _open_direct(path: str, flags: int) -> int | None:
    if not _O_DIRECT:
        return None
    try:
        return os.open(path, flags | os.O_CLOEXEC | _O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def _read_fully(fd: int, window: memoryview, offset: int, needed: int, path: str) -> None:
    """Fill ``window`` from ``offset``, stopping once ``needed`` bytes are there (the file may end then)."""
    done = 0
    while done < needed:
        count = os.preadv(fd, [window[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, f"the file ends at byte {offset + done}; it was longer when it was opened", path)
        done += count


def _write_fully(fd: int, window: memoryview, offset: int) -> None:
    done = 0
    while done < len(window):
        done += os.pwrite(fd, window[done:], offset + done)
