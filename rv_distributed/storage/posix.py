"""A checkpoint folder on a local or mounted file system: listing and small reads, for the planner."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rv_distributed.checkpoint.model import FileState
from rv_distributed.errors import InputError, Problem


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
        try:
            return sorted(self._walk(""))
        except OSError as error:
            raise InputError(
                [Problem(self.uri, f"cannot be listed: {error.strerror}", "Check its permissions.")]
            ) from error

    def _walk(self, prefix: str) -> Iterator[FileState]:
        with os.scandir(Path(self.uri, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir():
                    # A linked folder may lead back to itself; checkpoints have no use for one.
                    if not entry.is_symlink() and entry.name not in (".git", ".cache", "__pycache__"):
                        yield from self._walk(name + "/")
                elif entry.is_file():
                    yield FileState(name, entry.stat().st_size, state_of(entry.stat()))

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

    def state(self, name: str) -> str | None:
        """The present state of a file, as `files` reports it; None when it is gone."""
        try:
            return state_of(os.stat(self.path(name)))
        except OSError:
            return None

    def path(self, name: str) -> str:
        return os.path.join(self.uri, name)


def is_text(name: str) -> bool:
    """Whether a file name is UTF-8; Python hides other bytes in half surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def state_of(stat: os.stat_result) -> str:
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
