"""Bytes only: where checkpoints are read and outputs are written."""

from __future__ import annotations

import os
from urllib.parse import unquote

from rv_distributed.errors import UsageError, redacted
from rv_distributed.storage.posix import PosixFolder, is_text


def local_path(uri: str | os.PathLike[str]) -> str:
    """The absolute path that a path or a ``file://`` URI names; UsageError for any other scheme, and for names
    that are not text."""
    uri = os.fspath(uri)
    if "://" in uri:
        scheme, rest = uri.split("://", 1)
        if scheme != "file":
            shown = redacted(uri)
            raise UsageError(f"{shown}: this version has no storage for {scheme}://; give a local or mounted path")
        if not rest.removeprefix("localhost").startswith("/"):
            raise UsageError(f"{redacted(uri)} names another machine; write file:///path, or the path alone")
        uri = unquote(rest.removeprefix("localhost"))
    path = os.path.abspath(os.path.expanduser(uri))
    if not is_text(path):
        raise UsageError(f"{path!r} is not UTF-8; rename it, or reach it by another path")
    return path


def open_folder(uri: str | os.PathLike[str]) -> PosixFolder:
    """The folder behind a path or a ``file://`` URI. Raises as `local_path`."""
    return PosixFolder(local_path(uri))


__all__ = ["PosixFolder", "local_path", "open_folder"]
