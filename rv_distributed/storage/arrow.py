"""Azure's storage and HDFS, through Arrow's file systems.

Those have no aborted streams and no creation under a condition: a stream that is not wanted is closed and its file
removed, and a file counts as new when a look just before finds none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from pyarrow import ArrowException
from pyarrow.fs import AzureFileSystem, FileSelector, FileSystem, FileType

from rv_distributed.errors import UsageError, one_line
from rv_distributed.storage.protocols import StoredObject, Upload
from rv_distributed.storage.uris import StoreUri

_READ_BYTES: Final = 4 << 20


def open_arrow_store(uri: StoreUri) -> ArrowStore:
    """The store behind an ``abfs://`` or ``hdfs://`` URI."""
    key, token = os.environ.get("AZURE_STORAGE_KEY"), os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    try:
        if uri.scheme == "abfs" and (key or token):
            return ArrowStore(*_azure_by_key(uri, key, token), uri, makes_folders=False)
        system, root = FileSystem.from_uri(str(uri))
    except (OSError, ArrowException) as error:
        raise UsageError(f"{uri} cannot be opened: {one_line(str(error))}") from error
    return ArrowStore(system, root, uri, makes_folders=uri.scheme == "hdfs")


def _azure_by_key(uri: StoreUri, key: str | None, token: str | None) -> tuple[FileSystem, str]:
    """Azure's file system with the account's key or a token of its own, which Arrow finds nowhere by itself."""
    container, _, host = uri.authority.rpartition("@")
    scheme = "http" if uri.option("enable_tls") in ("false", "0") else "https"
    authorities = {name: uri.option(name) for name in ("blob_storage_authority", "dfs_storage_authority")}
    system = AzureFileSystem(
        host.partition(".")[0],
        account_key=key,
        sas_token=None if key else token,
        blob_storage_scheme=scheme,
        dfs_storage_scheme=scheme,
        **{name: authority for name, authority in authorities.items() if authority},
    )
    return system, container


class ArrowStore:
    """As `ObjectStore`: what lies below a folder of one of Arrow's file systems."""

    def __init__(self, system: Any, root: str, uri: StoreUri, *, makes_folders: bool) -> None:
        self.system, self._root, self._uri = system, root.rstrip("/"), uri
        self._makes_folders = makes_folders

    def list(self, prefix: str) -> Iterator[StoredObject]:
        folder = self._path(prefix.rpartition("/")[0]).rstrip("/")
        with self._naming(prefix):
            found = self.system.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
        for info in found:
            if info.type == FileType.File and self._key(info.path).startswith(prefix):
                yield StoredObject(self._key(info.path), info.size, _state(info))

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        with self._naming(key), self.system.open_input_file(self._path(key)) as file:
            end = file.size() if stop is None else min(stop, file.size())
            for offset in range(start, end, _READ_BYTES):
                take(memoryview(file.read_at(min(_READ_BYTES, end - offset), offset)))

    def put(self, key: str, data: bytes, *, only_new: bool = False) -> str:
        if only_new and self._info(key).type != FileType.NotFound:
            raise FileExistsError(errno.EEXIST, "exists already", self._named(key))
        upload = self.upload(key, len(data), len(data))
        try:
            upload.send(0, data)
        except BaseException:
            upload.abort()
            raise
        return upload.finish()

    def upload(self, key: str, nbytes: int, part_bytes: int) -> Upload:  # noqa: ARG002 - the end tells the size
        return _Stream(self, key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self._naming(key), suppress(FileNotFoundError):
                self.system.delete_file(self._path(key))

    def abort_uploads(self, prefix: str) -> int:  # noqa: ARG002 - as in the protocol
        """Nothing to do: what is not finished is a file like others, or goes after a week."""
        return 0

    def _info(self, key: str) -> Any:
        with self._naming(key):
            return self.system.get_file_info(self._path(key))

    def _open(self, key: str) -> Any:
        with self._naming(key):
            if self._makes_folders:
                self.system.create_dir(self._path(key).rpartition("/")[0], recursive=True)
            return self.system.open_output_stream(self._path(key))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if self._root else key

    def _key(self, path: str) -> str:
        return path.removeprefix(self._root).lstrip("/")

    def _named(self, key: str) -> str:
        return str(self._uri._replace(path=key))

    @contextmanager
    def _naming(self, key: str) -> Iterator[None]:
        """Give errors the name of the object; of Arrow's long texts, the first line."""
        try:
            yield
        except (OSError, ArrowException) as error:
            kind = type(error) if isinstance(error, (FileNotFoundError, PermissionError)) else OSError
            text = one_line(str(error).splitlines()[0] if str(error) else repr(error))
            raise kind(getattr(error, "errno", None) or errno.EIO, text, self._named(key)) from error


class _Stream:
    """As `Upload`: one stream."""

    parallel: Final = 1

    def __init__(self, store: ArrowStore, key: str) -> None:
        self._store, self._key, self._file = store, key, store._open(key)

    def send(self, number: int, data: bytes | bytearray) -> None:  # noqa: ARG002 - they come in order
        with self._store._naming(self._key):
            self._file.write(data)

    def finish(self) -> str:
        with self._store._naming(self._key):
            self._file.close()
        return _state(self._store._info(self._key))

    def abort(self) -> None:
        with suppress(OSError, ArrowException):
            self._file.close()
        self._store.delete([self._key])


def _state(info: Any) -> str:
    return f"{info.size}-{info.mtime_ns}"
