"""What the rest of the package asks of a storage: one small protocol a capability.

A checkpoint is read through a `Folder`, tensors through a `Reader` a file, shards are made through a `ShardWriter`
each. Files have `PosixFolder`, `RangeReader` and `RangeWriter`; whatever is an `ObjectStore` gets `ObjectFolder`,
`ObjectReader` and `ShardUpload`. All of them name what they could not do as an OSError with the file in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from rv_distributed.checkpoint.model import FileState


class Folder(Protocol):
    """A folder, bucket prefix or repository that holds a checkpoint."""

    @property
    def uri(self) -> str:
        """As resolved: an absolute path, or a URI without secrets. Any worker can open it."""
        ...

    def files(self) -> list[FileState]:
        """Every file below the folder, sorted by name.

        Raises InputError when there is none, or it cannot be listed.
        """
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` (or the end) of a file; fewer when it ends before ``stop``."""
        ...

    def states(self, names: Iterable[str]) -> dict[str, str]:
        """The present state of these files, as `files` reports it, without those that are gone. Raises OSError when the
        storage cannot tell."""
        ...

    def path(self, name: str) -> str:
        """The name under which `open_reader` opens a file."""
        ...


class Reader(Protocol):
    """Reads ranges of one file."""

    @property
    def path(self) -> str: ...

    @property
    def is_remote(self) -> bool:
        """Whether reads wait for a network, and not for this machine: such are begun early, and many at once, from any
        thread. Others belong to one thread at a time."""
        ...

    @property
    def cache_fd(self) -> int:
        """A file descriptor, good until `close`, by which to look into the page cache; -1 where there is none."""
        ...

    def read(self, buffer: memoryview, at: int, offset: int, nbytes: int) -> None:
        """Read file bytes ``offset`` to ``offset + nbytes`` into ``buffer[at:]``. Raises OSError, also when the file is
        too short."""
        ...

    def read_cached(self, window: memoryview, offset: int) -> int:
        """Copy what can be had without waiting of file bytes from ``offset`` on; the number of bytes copied."""
        ...

    def close(self) -> None: ...


class ShardWriter(Protocol):
    """Writes one piece of a shard: its bytes in order, then `finish`, then `close`."""

    @property
    def path(self) -> str: ...

    def write(self, window: memoryview, offset: int) -> None:
        """Write ``window`` at ``offset`` of the shard. Raises OSError."""
        ...

    def finish(self) -> str:
        """Return once what was written will stay: the shard's state where it is complete now, else nothing."""
        ...

    def close(self) -> None:
        """Let go; without `finish`, nothing is left of what a store had not made an object yet."""
        ...


class StoredObject(NamedTuple):
    """An object of a store."""

    key: str
    size: int
    """Bytes."""
    state: str
    """Changes when the object is replaced by other bytes: an etag, a checksum or, with less, a time."""


class TransientError(OSError):
    """What another try may cure: throttling, a reset connection, a server's own trouble."""


class ObjectStore(Protocol):
    """A bucket, or what has the same few operations. Safe for many threads.

    Errors are OSErrors: FileNotFoundError, PermissionError, FileExistsError, `TransientError` for those that are to
    be tried again, and others.
    """

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key begins with ``prefix``."""
        ...

    def fetch(self, key: str, start: int, stop: int | None, take: Callable[[memoryview], None]) -> None:
        """Give bytes ``start`` to ``stop`` (or the end) to ``take``, in order, as they come, in one request.

        Fewer when the object ends before ``stop``.
        """
        ...

    def put(self, key: str, data: bytes, *, only_new: bool = False) -> str:
        """Make an object; its state. With ``only_new``, FileExistsError where there is one: decided by the store
        itself if it can, otherwise by a look just before."""
        ...

    def upload(self, key: str, nbytes: int, part_bytes: int) -> Upload:
        """Begin an object of ``nbytes`` that comes in parts of ``part_bytes``."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are gone already are no error."""
        ...

    def abort_uploads(self, prefix: str) -> int:
        """Throw away what unfinished uploads have left under a prefix, where a store keeps such; how many."""
        ...


class Upload(Protocol):
    """An object in the making."""

    @property
    def parallel(self) -> int:
        """How many parts may be on their way at once; 1 where they must go in order."""
        ...

    def send(self, number: int, data: bytes | bytearray) -> None:
        """Send a part; numbers count from 0."""
        ...

    def finish(self) -> str:
        """Make the object of all parts; its state."""
        ...

    def abort(self) -> None:
        """Leave nothing behind."""
        ...
