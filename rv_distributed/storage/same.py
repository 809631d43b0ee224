"""Comparing two files, wherever they lie."""

from __future__ import annotations

import mmap
import os
from contextlib import closing
from typing import Final

from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.storage import open_reader

_COMPARED_BYTES: Final = 8 << 20


def same_bytes(path: str, other: str, nbytes: int) -> bool:
    """Whether two files of ``nbytes`` hold the same bytes; read up to the first difference. Raises OSError."""
    if not is_remote(path) and not is_remote(other) and os.path.samefile(path, other):
        return True
    # Pages, as direct reads want them.
    chunks = [memoryview(mmap.mmap(-1, _COMPARED_BYTES)) for _ in range(2)]
    with closing(open_reader(path)) as one, closing(open_reader(other)) as two:
        for offset in range(0, nbytes, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, nbytes - offset)
            one.read(chunks[0], 0, offset, count)
            two.read(chunks[1], 0, offset, count)
            if chunks[0][:count] != chunks[1][:count]:
                return False
    return True
