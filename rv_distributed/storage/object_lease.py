"""A lease on a prefix of an object store: an object in place of a lock file.

There are no locks, so whoever finds another's object has to wait and see, unless its holder was a process of this
machine that is no more. The object is made only where there is none: of two that come at once, one holds it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rv_distributed.storage.lease import Lease, holder_in, kernel, new_holder, outwait, packed, taken
from rv_distributed.storage.objects import patiently, read_all
from rv_distributed.storage.protocols import ObjectStore


@contextmanager
def leased_object(store: ObjectStore, key: str, *, subject: str) -> Iterator[Lease]:
    """Hold the lease of the object ``key``; ``subject`` is what it is about.

    Raises OutputError, naming the holder, when another process holds it, and OSError.
    """
    cell = _Object(store, key)
    if outwait(cell, subject, is_dead=_is_dead):
        patiently(cell.release)
    holder = {**new_holder(), "process": _process(os.getpid())}
    try:
        patiently(lambda: store.put(key, packed(holder), only_new=True))
    except FileExistsError:
        # It is this one's own when the answer to a first try was lost.
        found = holder_in(cell)
        if found.get("token") != holder["token"]:
            raise taken(subject, found) from None
    with Lease(cell, holder, subject) as lease:
        yield lease


class _Object:
    """An object that is there as long as it is held."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key, self.ended = store, key, threading.Event()

    def read(self) -> bytes | None:
        try:
            return read_all(self._store, self._key, ended=self.ended)
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        # Once: by the time that another try came through, the place could be another's.
        self._store.put(self._key, data)

    def release(self) -> None:
        self._store.delete([self._key])


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine, and is no more."""
    own = _process(os.getpid())
    pid, process = holder.get("pid"), holder.get("process")
    if own is None or holder.get("kernel") != kernel() or not isinstance(pid, int):
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
