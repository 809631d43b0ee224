"""Folders and readers on whatever is an `ObjectStore`."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeVar

from rv_distributed.checkpoint.model import FileState
from rv_distributed.checkpoint.uris import join
from rv_distributed.errors import InputError, Problem
from rv_distributed.storage.protocols import ObjectStore, TransientError
from rv_distributed.storage.stores import store_of
from rv_distributed.storage.uris import StoreUri

#: What a run keeps in a prefix besides its output, until that is complete.
OWN_FOLDER: Final = ".rv/"
#: Large reads go in requests of this size: small enough to come again after an error, large enough to be few.
REQUEST_BYTES: Final = 16 << 20
#: Small reads that are under way at once, of headers or records.
PARALLEL_READS: Final = 16
#: Of what a shard is sent in, unless it is so large that there would be too many.
PART_BYTES: Final = 8 << 20
#: Parts that are on their way while the next one is filled.
PARTS_IN_FLIGHT: Final = 4
#: What the writer of a shard holds.
WRITER_BYTES: Final = PART_BYTES * (PARTS_IN_FLIGHT + 1)
_MOST_TRIES: Final = 9
_FIRST_WAIT_S: Final = 0.2
_LONGEST_WAIT_S: Final = 10.0

_T = TypeVar("_T")


def files_among(names: Iterable[str]) -> set[str]:
    """Those that are neither a run's own notes nor the empty object that some tools make for each folder."""
    return {name for name in names if not name.startswith(OWN_FOLDER) and not f"/{name}".endswith("/")}


class Source(Protocol):
    """The part of `ObjectStore` that reads."""

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None: ...


class ObjectFolder:
    """All objects below a prefix."""

    def __init__(self, place: StoreUri) -> None:
        self._place, self.uri = place, str(place)
        self._prefix = f"{place.path}/" if place.path else ""

    @property
    def _store(self) -> ObjectStore:
        """Opened at the first use: credentials that are missing are a problem of the listing like others."""
        return store_of(self._place.store)

    def files(self) -> list[FileState]:
        try:
            found = self._listed()
        except OSError as error:
            what = f"cannot be listed: {error.strerror or error}"
            raise InputError([Problem(self.uri, what, "Check the address and the credentials.")]) from error
        if not found:
            raise InputError([Problem(self.uri, "does not exist, or holds no objects", "Check the address.")])
        return sorted(checked_names(self.uri, found))

    def _listed(self) -> list[FileState]:
        skip = len(self._prefix)
        objects = patiently(lambda: list(self._store.list(self._prefix)))
        files = [FileState(found.key[skip:], found.size, found.state) for found in objects]
        # Some tools make an empty object for each folder.
        return [file for file in files if file.name and not file.name.endswith("/")]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return read_all(self._store, self._prefix + name, start, stop)

    def states(self, names: Iterable[str]) -> dict[str, str]:
        wanted = set(names)
        return {file.name: file.state for file in self._listed() if file.name in wanted}

    def path(self, name: str) -> str:
        return join(self.uri, name)


def checked_names(uri: str, files: Iterable[FileState]) -> list[FileState]:
    """The files of a folder without a run's own. Raises InputError for names that would lead out of a folder."""
    kept = [file for file in files if not file.name.startswith(OWN_FOLDER)]
    odd = [file.name for file in kept if {"", ".", ".."} & set(file.name.split("/")) or "\0" in file.name]
    if odd:
        what = "holds an object whose name is none that a file in a folder could have"
        raise InputError([Problem(uri, f"{what}: {name!r}", "Rename it, or remove it.") for name in odd])
    return kept


class ObjectReader:
    """As `Reader`; any number of threads may read at once."""

    is_remote: Final = True
    cache_fd: Final = -1

    def __init__(self, source: Source, path: str, key: str, stop: threading.Event | None = None) -> None:
        """``stop`` is as in `patiently`."""
        self._source, self.path, self._key, self._stop = source, path, key, stop

    def read(self, buffer: memoryview, at: int, offset: int, nbytes: int) -> None:
        done = _read_into(self._source, self._key, buffer[at : at + nbytes], offset, self._stop)
        if done < nbytes:
            text = f"the object ends at byte {offset + done}; it was longer when it was opened"
            raise OSError(errno.EIO, text, self.path)

    def read_cached(self, window: memoryview, offset: int) -> int:  # noqa: ARG002 - nothing is at hand
        return 0

    def close(self) -> None:
        pass


def _read_into(source: Source, key: str, window: memoryview, offset: int, stop: threading.Event | None) -> int:
    """Fill ``window``; how much of it was there. What came before an error does not come again."""
    # Only workers need it. It lets go of the interpreter while it copies.
    import numpy as np

    to, done = np.frombuffer(window, np.uint8), 0

    def take(data: memoryview) -> None:
        nonlocal done
        to[done : done + len(data)] = np.frombuffer(data, np.uint8)
        done += len(data)

    patiently(lambda: source.fetch(key, offset + done, offset + len(window), take), lambda: done, stop)
    return done


def read_all(
    source: Source, key: str, start: int = 0, stop: int | None = None, *, ended: threading.Event | None = None
) -> bytes:
    """Bytes ``start`` to ``stop`` (or the end) of an object. ``ended`` is the ``stop`` of `patiently`."""
    got = bytearray()
    patiently(lambda: source.fetch(key, start + len(got), stop, got.extend), lambda: len(got), ended)
    return bytes(got)


def patiently(do: Callable[[], _T], so_far: Callable[[], int] = lambda: 0, stop: threading.Event | None = None) -> _T:
    """Call ``do``, and again after a `TransientError`, with longer and longer waits in between.

    Tries are counted from the last time that one got any further, which ``so_far`` tells. Once ``stop`` is set there
    are no more: a run that is stopped does not wait until a store is well again.
    """
    stop = stop or threading.Event()
    tries, reached = 0, so_far()
    while True:
        try:
            return do()
        except TransientError:
            tries = 1 if so_far() > reached else tries + 1
            reached = so_far()
            if tries >= _MOST_TRIES:
                raise
            longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**tries)
            if stop.wait(random.uniform(longest / 2, longest)):  # noqa: S311 - no secret
                raise
