"""A lease on a place that only one process may write to, on one machine or on many.

On one machine, and on file systems whose locks reach over machines, the kernel's lock decides; it is free when its
holder ends, however that ends. Some network file systems have no such locks, and object stores have none. So what a
lease is written in also carries a token and a beat that goes on while the holder lives: whoever finds the token of
another machine watches it for a while, and takes the place only when the beat stands still. A holder that wakes after
that, from a frozen or partitioned machine, finds another's token and may not publish any more. No clocks are compared.

`leased` holds the lease of a lock file; `object_lease.leased_object` that of an object.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol

from rv_distributed.errors import OutputError, RunError
from rv_distributed.storage.publish import create

_LOG = logging.getLogger(__name__)
#: How often a holder shows that it lives.
BEAT_S: Final = 3.0
#: How long a beat must stand still before its holder counts as dead.
STILL_S: Final = 20.0
_LOOK_S: Final = 0.5
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Cell(Protocol):
    """What a lease is written in. Raises OSError."""

    ended: threading.Event
    """Set at the lease's end: from then on a store that is away is not waited for."""

    def read(self) -> bytes | None:
        """What is there; None when it was let go."""
        ...

    def write(self, data: bytes) -> None: ...

    def release(self) -> None:
        """Let go of it."""
        ...


class Lease:
    """A lease that is held: ``cell`` says so of ``holder`` already.

    Inside of its context it beats; at the end it is let go, or left to the next holder, if there is one already.
    """

    def __init__(self, cell: Cell, holder: dict[str, Any], subject: str) -> None:
        self._cell, self._holder, self._subject = cell, holder, subject
        # What is read while it is written may be anything.
        self._one_at_a_time = threading.Lock()
        self.lost = False
        """Whether a beat has found that `check` would raise."""
        self._beating = threading.Thread(target=self._beat, name="rv-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cell.ended.set()
        self._beating.join()
        with suppress(OSError, RunError):
            self.check()
            self._cell.release()

    def check(self) -> None:
        """Raise RunError when another process has taken the place over, OSError when the storage cannot tell."""
        with self._one_at_a_time:
            found = holder_in(self._cell)
        if found.get("token") != self._holder["token"]:
            self.lost = True
            raise RunError(
                f"{self._subject}: another run ({_name(found)}) took the place over, as this one had shown no sign of "
                "life. Nothing more is written here; the finished pieces are that run's."
            )

    def _beat(self) -> None:
        while not self._cell.ended.wait(BEAT_S):
            # What another wrote stays: this one is no longer the holder, which `check` will say.
            with suppress(OSError, RunError):
                self.check()
                self._holder["beat"] += 1
                with self._one_at_a_time:
                    self._cell.write(packed(self._holder))


@contextmanager
def leased(path: str, *, subject: str) -> Iterator[Lease]:
    """Hold the lease whose lock file is ``path``; ``subject`` is what it is about.

    Raises OutputError, naming the holder, when another process holds it, and OSError.
    """
    with open(_lock(path, subject), "r+b", buffering=0) as locked:
        cell = _LockFile(path, locked.fileno())
        # A process of this machine would still have the lock if it lived.
        outwait(cell, subject, is_dead=lambda holder: holder.get("kernel") == kernel())
        holder = new_holder()
        cell.write(packed(holder))
        with Lease(cell, holder, subject) as lease:
            yield lease


class _LockFile:
    """A file that is locked, and empty when it was let go."""

    def __init__(self, path: str, fd: int) -> None:
        self._path, self._fd, self.ended = path, fd, threading.Event()

    def read(self) -> bytes | None:
        # Opened each time: network file systems look for other machines' changes when a file is opened.
        with suppress(FileNotFoundError), open(self._path, "rb") as file:
            return file.read(4096) or None
        return None

    def write(self, data: bytes) -> None:
        # A file object goes on after a short write, as os.pwrite does not.
        with open(self._fd, "wb", closefd=False) as file:
            file.seek(0)
            file.write(data)
        os.ftruncate(self._fd, len(data))

    def release(self) -> None:
        os.ftruncate(self._fd, 0)


def _lock(path: str, subject: str) -> int:
    """The locked file; opened again when its last holder deleted it in between."""
    while True:
        fd = create(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
            os.close(fd)
        except BlockingIOError:
            os.close(fd)
            raise taken(subject, holder_in(_LockFile(path, fd))) from None
        except OSError as error:
            os.close(fd)
            raise OutputError(f"{path}: the file system has no locks: {error.strerror}. Choose another.") from error


def outwait(cell: Cell, subject: str, *, is_dead: Callable[[dict[str, Any]], bool]) -> bool:
    """Return when no process holds the place any more; whether one has left its note there. Raises OutputError when
    one does.

    ``is_dead`` is true of a holder that is known to be no more, so that nobody needs to wait for it.
    """
    found = holder_in(cell)
    if not found:
        return False
    if is_dead(found):
        return True
    _LOG.warning("%s was left locked by %s; waiting %.0f s for a sign of life", subject, _name(found), STILL_S)
    until = time.monotonic() + STILL_S
    while time.monotonic() < until:
        time.sleep(_LOOK_S)
        now = holder_in(cell)
        if not now:
            return False
        if now != found:
            raise taken(subject, now)
    return True


def new_holder() -> dict[str, Any]:
    """What a lease says of this process."""
    return {
        "kernel": kernel(),
        "token": secrets.token_hex(8),
        "beat": 0,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def packed(holder: dict[str, Any]) -> bytes:
    """As it is written."""
    return json.dumps(holder).encode()


def holder_in(cell: Cell) -> dict[str, Any]:
    """Who holds a place; nothing when it was let go."""
    raw = cell.read()
    if raw is None:
        return {}
    try:
        document = json.loads(raw)
    except ValueError:
        document = None  # another machine is writing it just now
    return document if isinstance(document, dict) else {"unread": raw.decode(errors="replace")}


def taken(subject: str, holder: dict[str, Any]) -> OutputError:
    """What a process is told that finds another at work."""
    return OutputError(f"{subject}: another run is writing it ({_name(holder)}). Wait for it, or end it first.")


def kernel() -> str:
    """What tells this running system from all others, containers on one kernel not from each other."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return socket.gethostname()


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"
