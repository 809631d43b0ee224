"""Bytes only: where checkpoints are read and outputs are written."""

from __future__ import annotations

from rv_distributed.errors import UsageError
from rv_distributed.storage.posix import PosixFolder


def open_folder(uri: str) -> PosixFolder:
    """The folder behind a path or a ``file://`` URI; UsageError for any other scheme."""
    if "://" in uri:
        scheme, path = uri.split("://", 1)
        if scheme != "file":
            raise UsageError(f"{uri}: {scheme}:// is not a storage this version reads; give a local or mounted path")
        uri = path
    return PosixFolder(uri)


__all__ = ["PosixFolder", "open_folder"]
