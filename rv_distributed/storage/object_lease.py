"""A lease on a prefix of an object store: an object that carries a token and a beat.

Whoever finds another's token watches it for a while and takes the place only when the beat stands still, or at once
when the holder was a process of this machine that is no more. The object is made only where there is none, so of two
that come at once, one holds it. A holder that wakes after it was given up finds another's token and may not publish.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rv_distributed.errors import OutputError, RunError
from rv_distributed.storage import lease
from rv_distributed.storage.objects import patiently, read_all
from rv_distributed.storage.protocols import ObjectStore


class ObjectLease:
    """A lease that is held."""

    def __init__(self, store: ObjectStore, key: str, subject: str) -> None:
        """Raises FileExistsError when another one has it."""
        self._store, self._key, self._subject = store, key, subject
        self._holder: dict[str, Any] = {**lease.new_holder(), "process": _process(os.getpid())}
        self._ended = threading.Event()
        self.lost = False
        """Whether a beat has found that `check` would raise."""
        try:
            patiently(lambda: store.put(key, self._document(), only_new=True))
        except FileExistsError:
            # It is this one when the answer to a first try was lost.
            if _read(store, key).get("token") != self._holder["token"]:
                raise
        self._beating = threading.Thread(target=self._beat, name="rv-lease", daemon=True)
        self._beating.start()

    def check(self) -> None:
        """Raise RunError when another process has taken the place over."""
        found = _read(self._store, self._key)
        if found.get("token") != self._holder["token"]:
            self.lost = True
            raise lease.taken_over(self._subject, found)

    def end(self) -> None:
        """Let go; leave the object to the next holder, if there is one already."""
        self._ended.set()
        self._beating.join()
        with suppress(OSError, RunError):
            self.check()
            self._store.delete([self._key])

    def _beat(self) -> None:
        while not self._ended.wait(lease.BEAT_S):
            # What another wrote stays: this one is no longer the holder, which `check` will say.
            with suppress(OSError, RunError):
                self.check()
                self._holder["beat"] += 1
                self._store.put(self._key, self._document())

    def _document(self) -> bytes:
        return json.dumps(self._holder).encode()


@contextmanager
def leased_object(store: ObjectStore, key: str, *, subject: str) -> Iterator[ObjectLease]:
    """Hold the lease of the object ``key``; ``subject`` is what it is about.

    Raises OutputError, naming the holder, when another process holds it.
    """
    _outwait(store, key, subject)
    try:
        held = ObjectLease(store, key, subject)
    except FileExistsError:
        raise lease.taken(subject, _read(store, key)) from None
    try:
        yield held
    finally:
        held.end()


def _outwait(store: ObjectStore, key: str, subject: str) -> None:
    """Return when nobody holds the place any more. Raises OutputError when somebody does."""
    found = _read(store, key)
    if not found:
        return
    if not _is_dead(found):
        lease.warn_of_wait(subject, found)
        until = time.monotonic() + lease.STILL_S
        while time.monotonic() < until:
            time.sleep(min(1.0, lease.STILL_S / 10))
            now = _read(store, key)
            if not now:
                return
            if now != found:
                raise lease.taken(subject, now)
    patiently(lambda: store.delete([key]))


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine, and is no more."""
    own = _process(os.getpid())
    pid, process = holder.get("pid"), holder.get("process")
    if own is None or holder.get("kernel") != lease.kernel() or not isinstance(pid, int):
        return False
    return isinstance(process, list) and process[:1] == own[:1] and _process(pid) != process


def _process(pid: int) -> list[str] | None:
    """What tells a process from all others of this kernel, first of all the space that its number counts in."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    with suppress(OSError, IndexError):
        return [space, str(pid), Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]]
    return [space, str(pid), "gone"]


def _read(store: ObjectStore, key: str) -> dict[str, Any]:
    """What the object says; nothing when there is none."""
    try:
        text = read_all(store, key)
        document = json.loads(text)
    except FileNotFoundError:
        return {}
    except ValueError:
        document = None
    except OSError as error:
        raise OutputError(f"{error.filename}: {error.strerror}") from error
    return document if isinstance(document, dict) else {"unread": text.decode(errors="replace")}
