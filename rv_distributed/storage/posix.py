"""A checkpoint folder on a local or mounted file system: listing and small reads, for the planner."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Final

from rv_distributed.checkpoint.model import FileState
from rv_distributed.errors import InputError, Problem

_SNAPSHOT: Final = re.compile(r"(?P<repository>(?P<cache>.*)/models--[^/]+)/snapshots/[^/]+/")
#: What huggingface_hub puts into the folder of the blobs that the repositories of a cache share.
_SHARED_BLOBS_MARKER: Final = ".huggingface-shared-blobs"


class PosixFolder:
    """A folder, by its absolute path. Symbolic links are kept in the path and followed when opened."""

    def __init__(self, path: str) -> None:
        self.uri = path

    def files(self) -> list[FileState]:
        """Every regular file below the folder, sorted by name.

        Raises InputError when the folder is missing, is no folder, or cannot be read.
        """
        if not os.path.isdir(self.uri):
            what = "is a file, not a folder" if os.path.exists(self.uri) else "does not exist"
            raise InputError([Problem(self.uri, what, "Give the folder of a checkpoint.")])
        found = []
        for name in self._names():
            stat = _stat(self.path(name))
            if stat is not None and S_ISREG(stat.st_mode):
                found.append(FileState(name, stat.st_size, state_of(stat)))
        return sorted(found)

    def broken_links(self) -> dict[str, str]:
        """The links below the folder that lead to nothing in reach, and what they name. Raises as `files`."""
        paths = {name: self.path(name) for name in self._names()}
        return {name: os.readlink(path) for name, path in paths.items() if os.path.islink(path) and _stat(path) is None}

    def leads_elsewhere(self, name: str) -> str | None:
        """Where a file really lies, when that is neither in this folder nor, for a snapshot in a Hugging Face
        cache, among the blobs of the same repository or those that the cache's repositories share."""
        real, folder = os.path.realpath(self.path(name)), os.path.realpath(self.uri)
        own = [folder]
        if cached := _SNAPSHOT.match(folder + "/"):
            own.append(f"{cached['repository']}/blobs")
            if os.path.isfile(f"{cached['cache']}/blobs/{_SHARED_BLOBS_MARKER}"):
                own.append(f"{cached['cache']}/blobs")
        return None if any(os.path.commonpath([real, place]) == place for place in own) else real

    def _names(self) -> list[str]:
        try:
            return list(self._walk(""))
        except OSError as error:
            what = f"cannot be listed: {error.strerror}"
            raise InputError([Problem(str(error.filename or self.uri), what, "Check its permissions.")]) from error

    def _walk(self, prefix: str) -> Iterator[str]:
        with os.scandir(Path(self.uri, prefix)) as entries:
            for entry in entries:
                # A linked folder may lead back to itself; checkpoints have no use for one.
                if not entry.is_dir(follow_symlinks=False):
                    yield prefix + entry.name
                elif entry.name not in (".git", ".cache", "__pycache__"):
                    yield from self._walk(f"{prefix}{entry.name}/")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` (or the end) of a file; fewer when the file ends before ``stop``."""
        with open(self.path(name), "rb", buffering=0) as file:
            file.seek(start)
            chunks = []
            left = os.fstat(file.fileno()).st_size - start if stop is None else stop - start
            while left > 0 and (chunk := file.read(left)):
                chunks.append(chunk)
                left -= len(chunk)
            return b"".join(chunks)

    def states(self, names: Iterable[str]) -> dict[str, str]:
        """The present state of these files, as `files` reports it, without those that are gone. Raises OSError when the
        file system cannot tell."""
        states = {}
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                states[name] = state_of(os.stat(self.path(name)))
        return states

    def path(self, name: str) -> str:
        return os.path.join(self.uri, name)


def is_text(name: str) -> bool:
    """Whether a file name is UTF-8; Python hides other bytes in half surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def state_of(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
