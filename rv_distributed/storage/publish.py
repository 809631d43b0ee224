"""Making files appear whole or not at all: preallocation, durable writes and the final rename."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache


def create(path: str, flags: int) -> int:
    """Open a file, with the umask's permissions if it is new, but never writable for everyone: what is staged is
    checked and then trusted. An ``opener`` for `open`."""
    return os.open(path, flags, 0o664)


def make_folder(path: str) -> None:
    """Make a folder, and those above it that are missing, with such permissions; they are on the device then."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path) or os.curdir)
        try:
            os.mkdir(path, 0o775)
        except FileExistsError:
            # Another process was quicker, unless it is a file.
            if not os.path.isdir(path):
                raise
        sync(os.path.dirname(path) or os.curdir)


def preallocate(path: str, size: int) -> None:
    """Create ``path`` with ``size`` bytes of reserved space, or extend it; contents are kept.

    Raises OSError, with ENOSPC when the space is not there; then a new file is taken away again.
    """
    is_new = not os.path.exists(path)
    fd = create(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size != size:
            os.ftruncate(fd, size)
        if size:
            _fallocate(fd, size)
    except OSError:
        if is_new:
            os.remove(path)
        raise
    finally:
        os.close(fd)


@cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, size: int) -> None:
    # os.posix_fallocate writes the whole file where the file system cannot reserve space; the system call
    # just says so, and then a sparse file has to do.
    call = getattr(_c_library(), "fallocate64", None)
    if call is None:
        return
    if call(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))


def write_durably(path: str, data: bytes) -> None:
    """Write a whole file, all of it or nothing, and return once it is on the device."""
    new = path + ".new"
    try:
        with naming(new), open(new, "wb", opener=create) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        with suppress(OSError):
            os.remove(new)
        raise
    sync(os.path.dirname(path) or os.curdir)


def sync(path: str) -> None:
    """Flush a file or a folder to the device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Give errors of calls on an open file the file's name, which the system leaves out."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def publish(staged: str, out: str, *, replaced: str) -> None:
    """Make the folder ``staged`` be ``out``; returns once that is on the device. Raises OSError when it is not.

    An ``out`` that exists is deleted last. Where the file system can exchange two names, ``out`` is the old or the
    new one at every moment; elsewhere the old one moves to ``replaced`` in between, and `recover` brings it back.
    """
    if not os.path.lexists(out):
        os.rename(staged, out)
    elif not _exchange(staged, out):
        os.rename(out, replaced)
        os.rename(staged, out)
    sync(os.path.dirname(out) or os.curdir)
    sync(os.path.dirname(staged) or os.curdir)
    # The new output is there. What cannot be deleted does not make the run a failure: the next one deletes it.
    with suppress(OSError):
        remove(staged)
        remove(replaced)


def _exchange(one: str, other: str) -> bool:
    """Exchange two names in one step, if the system and the file system can."""
    call = getattr(_c_library(), "renameat2", None)
    at_cwd, exchange = -100, 2
    return call is not None and call(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def recover(out: str, *, replaced: str) -> None:
    """Finish or undo a `publish` that was cut short: ``replaced`` comes back where ``out`` is missing, and
    goes where the new ``out`` is in its place."""
    if os.path.lexists(replaced) and not os.path.lexists(out):
        os.rename(replaced, out)
    remove(replaced)


def remove(path: str) -> None:
    """Delete a folder with all that is in it, a file, or a link (but not what it leads to), if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)
