"""Page-aligned memory that the kernel's direct I/O, NumPy and torch can use."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from typing import Final

import numpy as np
import numpy.typing as npt

from rv_distributed.checkpoint.sources import ByteRange
from rv_distributed.errors import RunError
from rv_distributed.storage import Reader
from rv_distributed.storage.ranges import ALIGNMENT

Bytes = npt.NDArray[np.uint8]
#: Of Linux from 5.14 on; Python has no name for it.
_MADV_POPULATE_WRITE: Final = 23


class Buffer:
    """Anonymous memory, ``pinned`` for a GPU's copies if asked. ``view`` is its bytes, ``array`` the same for NumPy."""

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._allocate(nbytes)

    def grow(self, nbytes: int) -> None:
        """Make room for ``nbytes``; contents are lost if that needs new memory."""
        if nbytes > len(self.view):
            self._free()
            self._allocate(nbytes)

    def _allocate(self, nbytes: int) -> None:
        size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            # Copying, computing and above all direct I/O look up each page.
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            # So a run that there is no memory for ends soon, and takes as much of it whatever it copies.
            with suppress(OSError):
                self._memory.madvise(_MADV_POPULATE_WRITE)
        self.view = memoryview(self._memory)
        self.array: Bytes = np.frombuffer(self._memory, np.uint8)
        if self._pinned:
            # Before the memory goes: what comes to lie there next could not be pinned.
            self._unpin = weakref.finalize(self, _unpin, _pin(self.array))
            self._unpin.atexit = False

    def _free(self) -> None:
        if self._pinned:
            self._unpin()
        self.view.release()
        # The mapping itself goes with its last reference; a tensor may still look at it.
        del self._memory, self.array


def _pin(array: Bytes) -> int:
    """Lock the memory for a GPU's copies; returns its address."""
    import torch

    address = array.ctypes.data
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, array.nbytes, 0))
    except RuntimeError as error:
        raise RunError(
            f"{array.nbytes} bytes of memory cannot be pinned for the GPU ({error}): give a smaller --memory-budget, "
            "or --device cpu"
        ) from error
    return address


def _unpin(address: int) -> None:
    import torch

    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))


def read_range(reader: Reader, wanted: ByteRange) -> Bytes:
    """Some bytes of the reader's file, in memory of their own. Raises OSError."""
    at = wanted.offset % ALIGNMENT
    buffer = Buffer(at + wanted.nbytes + ALIGNMENT)
    reader.read(buffer.view, at, wanted.offset, wanted.nbytes)
    return buffer.array[at : at + wanted.nbytes]
