"""What the storage under a folder can do, measured the way that workers use it, and what that predicts.

The figures are kept in the user's cache folder, by file system, so that a later run can say how close to
them it came.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import OutputError, UsageError, redacted
from rv_distributed.runtime.select import RunOptions, expected_shape
from rv_distributed.runtime.sizing import default_streams
from rv_distributed.storage.publish import preallocate
from rv_distributed.storage.ranges import RangeReader, RangeWriter

DEFAULT_BYTES: Final = 1 << 30
#: Measurements of less say more of caches and of the start of threads than of the storage.
LEAST_KEPT_BYTES: Final = 256 << 20
_CHUNK: Final = 4 << 20
#: A transfer reads three checkpoints for one that it writes.
_READS_A_WRITE: Final = 3


@dataclass(frozen=True, slots=True)
class StorageSpeed:
    """Bytes a second, with as many threads as a run has by default."""

    write: float
    """Sequential direct writes, flushed to the device at the end."""
    read: float
    """Sequential reads of what is not in the page cache."""
    cached_read: float
    """The same from the page cache."""
    mixed: float
    """Bytes moved in all while three are read, not from the cache, for one that is written."""

    def predict_s(self, bytes_read: int, bytes_written: int) -> float:
        """Seconds that a run takes at least when its inputs are not in the page cache."""
        both = min(bytes_read / _READS_A_WRITE, bytes_written)
        mixed_s = both * (_READS_A_WRITE + 1) / self.mixed
        return mixed_s + (bytes_read - both * _READS_A_WRITE) / self.read + (bytes_written - both) / self.write


def measure_storage(folder: str, nbytes: int = DEFAULT_BYTES) -> StorageSpeed:
    """Measure the file system of ``folder`` with two temporary files of ``nbytes`` in it, and keep the result, unless
    ``nbytes`` is less than `LEAST_KEPT_BYTES`.

    Raises OutputError when they cannot be written there, UsageError for a URI.
    """
    if is_remote(folder):
        raise UsageError(f"{redacted(folder)}: only local and mounted folders can be measured")
    nbytes = max(_CHUNK, nbytes // _CHUNK * _CHUNK)
    try:
        with tempfile.TemporaryDirectory(prefix=".rv-bench-", dir=folder) as work:
            source, copy = os.path.join(work, "source"), os.path.join(work, "copy")
            preallocate(source, nbytes)
            preallocate(copy, nbytes)
            write = nbytes / _timed(nbytes, _writer(source), flush=source)
            _drop_cache(source)
            read = nbytes / _timed(nbytes, _reader(source))
            with open(source, "rb") as file:
                while file.read(_CHUNK):
                    pass
            cached = nbytes / _timed(nbytes, _reader(source))
            _drop_cache(source)
            mixed = nbytes * (1 + 1 / _READS_A_WRITE) / _timed(nbytes, _mixer(source, copy), flush=copy)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be measured: {error.strerror}") from error
    speed = StorageSpeed(write, read, cached, mixed)
    if nbytes >= LEAST_KEPT_BYTES:
        _remember(folder, speed)
    return speed


def known_speed(folder: str) -> StorageSpeed | None:
    """What `measure_storage` last found for the file system of ``folder``, if it ever did."""
    try:
        kept = json.loads(_cache_file().read_bytes())
        speed = StorageSpeed(**kept[str(os.stat(folder).st_dev)])
        return speed if min(speed.write, speed.read, speed.cached_read, speed.mixed) > 0 else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _timed(nbytes: int, make: Callable[[], Callable[[int], None]], flush: str | None = None) -> float:
    """Seconds that all threads take for every chunk; ``make`` gives each of them its own function."""
    offsets = iter(range(0, nbytes, _CHUNK))
    taking = threading.Lock()
    errors: list[OSError] = []

    def work() -> None:
        try:
            do = make()
            while True:
                with taking:
                    offset = next(offsets, None)
                if offset is None:
                    return
                do(offset)
        except OSError as error:
            errors.append(error)

    streams = default_streams(expected_shape(RunOptions(), "local"))
    threads = [threading.Thread(target=work) for _ in range(streams)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if flush is not None:
        fd = os.open(flush, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return time.perf_counter() - began


def _writer(path: str) -> Callable[[], Callable[[int], None]]:
    def make() -> Callable[[int], None]:
        writer, buffer = RangeWriter(path), _random_chunk()
        return lambda offset: writer.write(buffer, offset)

    return make


def _reader(path: str) -> Callable[[], Callable[[int], None]]:
    def make() -> Callable[[int], None]:
        reader, buffer = RangeReader(path), _random_chunk()
        return lambda offset: reader.read(buffer, 0, offset, _CHUNK)

    return make


def _mixer(source: str, copy: str) -> Callable[[], Callable[[int], None]]:
    def make() -> Callable[[int], None]:
        read, write = _reader(source)(), _writer(copy)()

        def both(offset: int) -> None:
            read(offset)
            if offset // _CHUNK % _READS_A_WRITE == 0:
                write(offset // _READS_A_WRITE // _CHUNK * _CHUNK)

        return both

    return make


def _random_chunk() -> memoryview:
    """Page-aligned memory with contents that no storage can compress."""
    memory = mmap.mmap(-1, _CHUNK)
    memory[:] = os.urandom(_CHUNK)
    return memoryview(memory)


def _drop_cache(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "rv_distributed", "storage.json")


def _remember(folder: str, speed: StorageSpeed) -> None:
    # Without a home, or a place to write in it, the figures are just not kept.
    with suppress(OSError, RuntimeError):
        path = _cache_file()
        try:
            kept = json.loads(path.read_bytes())
        except (OSError, ValueError):
            kept = {}
        kept[str(os.stat(folder).st_dev)] = asdict(speed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=2))
