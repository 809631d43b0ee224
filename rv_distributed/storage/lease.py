"""A lease on a place that only one process may write to, on one machine or on many.

On one machine, and on file systems whose locks reach over machines, the kernel's lock decides; it is free when its
holder ends, however that ends. Some network file systems have no such locks. So the lock file also carries a token and
a beat that goes on while the holder lives: whoever finds the token of another machine watches it for a while, and takes
the place only when the beat stands still. A holder that wakes after that, from a frozen or partitioned machine, finds
another's token and may not publish any more. No clocks are compared.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from rv_distributed.errors import OutputError, RunError
from rv_distributed.storage.publish import create

_LOG = logging.getLogger(__name__)
#: How often a holder shows that it lives.
BEAT_S: Final = 3.0
#: How long a beat must stand still before its holder counts as dead.
STILL_S: Final = 20.0
_LOOK_S: Final = 0.2
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Lease:
    """A lease that is held."""

    def __init__(self, path: str, fd: int, subject: str) -> None:
        self._path, self._fd, self._subject = path, fd, subject
        self._holder = new_holder()
        self._ended = threading.Event()
        self._one_at_a_time = threading.Lock()
        self.lost = False
        """Whether a beat has found that `check` would raise."""
        self._write()
        self._beating = threading.Thread(target=self._beat, name="rv-lease", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raise RunError when another process has taken the place over."""
        with self._one_at_a_time:
            found = _read(self._path)
        if found.get("token") != self._holder["token"]:
            self.lost = True
            raise taken_over(self._subject, found)

    def end(self) -> None:
        """Let go; leave the file to the next holder, if there is one already."""
        self._ended.set()
        self._beating.join()
        with suppress(OSError, RunError):
            self.check()
            os.ftruncate(self._fd, 0)
        os.close(self._fd)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            # What another wrote stays: this one is no longer the holder, which `check` will say.
            with suppress(OSError, RunError):
                self.check()
                self._holder["beat"] += 1
                self._write()

    def _write(self) -> None:
        data = json.dumps(self._holder).encode()
        with self._one_at_a_time:
            # A file object goes on after a short write, as os.pwrite does not.
            with open(self._fd, "wb", closefd=False) as file:
                file.seek(0)
                file.write(data)
            os.ftruncate(self._fd, len(data))


@contextmanager
def leased(path: str, *, subject: str) -> Iterator[Lease]:
    """Hold the lease whose lock file is ``path``; ``subject`` is what it is about.

    Raises OutputError, naming the holder, when another process holds it.
    """
    fd = _lock(path, subject)
    try:
        _outwait(path, subject)
        lease = Lease(path, fd, subject)
    except BaseException:
        os.close(fd)
        raise
    try:
        yield lease
    finally:
        lease.end()


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
            raise taken(subject, _read(path)) from None
        except OSError as error:
            os.close(fd)
            raise OutputError(f"{path}: the file system has no locks: {error.strerror}. Choose another.") from error


def _outwait(path: str, subject: str) -> None:
    """Return when no process of another machine is writing here. Raises OutputError when one is."""
    found = _read(path)
    if not found or found.get("kernel") == kernel():
        return  # let go, or of a process that would still have the lock if it lived
    warn_of_wait(subject, found)
    until = time.monotonic() + STILL_S
    while time.monotonic() < until:
        time.sleep(_LOOK_S)
        now = _read(path)
        if not now:
            return
        if now != found:
            raise taken(subject, now)


def new_holder() -> dict[str, Any]:
    """What a lease says of this process."""
    return {
        "kernel": kernel(),
        "token": secrets.token_hex(8),
        "beat": 0,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def warn_of_wait(subject: str, holder: dict[str, Any]) -> None:
    _LOG.warning("%s was left locked by %s; waiting %.0f s for a sign of life", subject, _name(holder), STILL_S)


def taken_over(subject: str, holder: dict[str, Any]) -> RunError:
    return RunError(
        f"{subject}: another run ({_name(holder)}) took the place over, as this one had shown no sign of "
        "life. Nothing more is written here; the finished pieces are that run's."
    )


def taken(subject: str, holder: dict[str, Any]) -> OutputError:
    return OutputError(f"{subject}: another run is writing it ({_name(holder)}). Wait for it, or end it first.")


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')}"


def _read(path: str) -> dict[str, Any]:
    """What the lock file says; nothing when it was let go."""
    try:
        # Opened each time: network file systems look for other machines' changes when a file is opened.
        with open(path, "rb") as file:
            text = file.read(4096)
        document = json.loads(text) if text else {}
    except FileNotFoundError:
        return {}
    except ValueError:
        document = None  # another machine is writing it just now
    return document if isinstance(document, dict) else {"unread": text.decode(errors="replace")}


def kernel() -> str:
    """What tells this running system from all others, containers on one kernel not from each other."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return socket.gethostname()
