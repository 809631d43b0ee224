"""Page-aligned memory that both the kernel's direct I/O and torch can use."""

from __future__ import annotations

import mmap

import torch


class Buffer:
    """Anonymous memory, pinned for a GPU's copies when the device is one. ``view`` is its bytes."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._allocate(nbytes)

    def grow(self, nbytes: int) -> None:
        """Make room for ``nbytes``; contents are lost if that needs new memory."""
        if nbytes > len(self.view):
            self._free()
            self._allocate(nbytes)

    def tensor(self, at: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """``count`` elements from byte ``at``: a view, or a copy where ``at`` is not aligned for ``dtype``."""
        if at % dtype.itemsize == 0:
            return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=at)
        raw = torch.frombuffer(self._memory, dtype=torch.uint8, count=count * dtype.itemsize, offset=at)
        return raw.clone().view(dtype)

    def _allocate(self, nbytes: int) -> None:
        size = -(-max(nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._memory)
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(self._address(), len(self.view), 0))

    def _free(self) -> None:
        if self._pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._address()))
        self.view.release()
        # The mapping itself goes with its last reference; a tensor may still look at it.
        del self._memory

    def _address(self) -> int:
        return torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
