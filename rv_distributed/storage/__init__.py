"""Bytes only: where checkpoints are read and outputs are written.

`open_folder` opens what a user names; `open_reader` and `open_writer` open on any worker what a plan names.
"""

from __future__ import annotations

import os
import re
import threading
from typing import Final
from urllib.parse import unquote

from rv_distributed.checkpoint.uris import is_remote, join
from rv_distributed.errors import UsageError, redacted
from rv_distributed.storage.posix import PosixFolder, is_text
from rv_distributed.storage.protocols import Folder, ObjectStore, Reader, ShardWriter
from rv_distributed.storage.ranges import RangeReader, RangeWriter
from rv_distributed.storage.uris import is_store_uri, parse_hub_uri, parse_store_uri

HUB: Final = "hf://"
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[^@\s]+)?")


def resolve(uri: str | os.PathLike[str]) -> str:
    """The one name that every process knows a place by: an absolute path, or a URI.

    A ``file://`` URI is its path, and ``org/name`` that is no local path is a model on the Hub.
    Raises UsageError for unknown schemes, and for names that are not text.
    """
    text = os.fspath(uri)
    if text.startswith(HUB):
        return text
    if is_store_uri(text):
        return str(parse_store_uri(text))
    if is_hub_name(text) and not os.path.lexists(text):
        return HUB + text
    return local_path(text)


def is_hub_name(text: str) -> bool:
    """Whether it reads ``org/name`` or ``org/name@revision``; a path may, too."""
    return _HUB_NAME.fullmatch(text) is not None


def resolve_output(uri: str | os.PathLike[str]) -> str:
    """As `resolve`; but a new output without a scheme is a local folder, however it is called."""
    text = os.fspath(uri)
    return resolve(text) if "://" in text else local_path(text)


def local_path(uri: str | os.PathLike[str]) -> str:
    """The absolute path that a path or a ``file://`` URI names; UsageError for any other scheme, and for names
    that are not text."""
    uri = os.fspath(uri)
    if "://" in uri:
        scheme, rest = uri.split("://", 1)
        if scheme != "file":
            known = "file, hf, s3, gs, abfs and hdfs"
            raise UsageError(f"{redacted(uri)}: there is no storage for {scheme}:// here, only for {known}")
        if not rest.removeprefix("localhost").startswith("/"):
            raise UsageError(f"{redacted(uri)} names another machine; write file:///path, or the path alone")
        uri = unquote(rest.removeprefix("localhost"))
    path = os.path.abspath(os.path.expanduser(uri))
    if not is_text(path):
        raise UsageError(f"{path!r} is not UTF-8; rename it, or reach it by another path")
    return path


def open_folder(uri: str | os.PathLike[str]) -> Folder:
    """The folder behind a path, a URI or the name of a model on the Hub. Raises as `resolve`, and InputError when the
    Hub has no such model."""
    place = resolve(uri)
    if place.startswith(HUB):
        from rv_distributed.storage.hub import HubFolder

        return HubFolder(parse_hub_uri(place))
    if is_remote(place):
        from rv_distributed.storage.objects import ObjectFolder

        return ObjectFolder(parse_store_uri(place))
    return PosixFolder(place)


def open_store(uri: str) -> tuple[ObjectStore, str]:
    """The object store behind a resolved URI, and the key in it. Raises as `store_of`."""
    from rv_distributed.storage.stores import store_of

    parsed = parse_store_uri(uri)
    return store_of(parsed.store), parsed.path


def open_reader(path: str, stop: threading.Event | None = None) -> Reader:
    """A reader of a file named by `Folder.path`; once ``stop`` is set, it tries nothing again. Raises OSError."""
    if path.startswith(HUB):
        from rv_distributed.storage.hub import open_hub_reader

        return open_hub_reader(path, stop)
    if is_remote(path):
        from rv_distributed.storage.objects import ObjectReader

        store, key = open_store(path)
        return ObjectReader(store, path, key, stop)
    return RangeReader(path)


def open_writer(folder: str, name: str, nbytes: int, stop: threading.Event | None = None) -> ShardWriter:
    """A writer of a piece of ``nbytes`` of a shard: anywhere in a file that exists in full size, or all of an object.
    Once ``stop`` is set, it tries nothing again. Raises OSError."""
    path = join(folder, name)
    if is_remote(path):
        from rv_distributed.storage.upload import ShardUpload

        store, key = open_store(path)
        return ShardUpload(store, path, key, nbytes, stop)
    return RangeWriter(path)


__all__ = [
    "Folder",
    "PosixFolder",
    "Reader",
    "ShardWriter",
    "is_hub_name",
    "local_path",
    "open_folder",
    "open_reader",
    "open_store",
    "open_writer",
    "resolve",
    "resolve_output",
]
