"""Comparing two files, wherever they lie."""

from __future__ import annotations

import mmap
import os
from collections.abc import Generator
from contextlib import closing
from typing import Final

from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.storage import open_reader
from rv_distributed.storage.ranges import ALIGNMENT

_WINDOW_BYTES: Final = 8 << 20


def same_bytes(path: str, other: str, nbytes: int) -> bool:
    """Whether two files of ``nbytes`` hold the same bytes; read up to the first difference. Raises OSError."""
    if not is_remote(path) and not is_remote(other) and os.path.samefile(path, other):
        return True
    with closing(windows((path, 0), (other, 0), nbytes)) as read:
        return all(one == two for one, two in read)


def windows(
    one: tuple[str, int], other: tuple[str, int], nbytes: int
) -> Generator[tuple[memoryview, memoryview], None, None]:
    """The same ``nbytes`` bytes of two files, each given as its path and the first byte's offset, window by window;
    each is valid until the next. All but the last are of a size that every dtype's divides. Raises OSError."""
    # Pages, as direct reads want them.
    chunks = [memoryview(mmap.mmap(-1, _WINDOW_BYTES + 2 * ALIGNMENT)) for _ in range(2)]
    with closing(open_reader(one[0])) as first, closing(open_reader(other[0])) as second:
        for done in range(0, nbytes, _WINDOW_BYTES):
            count = min(_WINDOW_BYTES, nbytes - done)
            places = [(start + done) % ALIGNMENT for _, start in (one, other)]
            first.read(chunks[0], places[0], one[1] + done, count)
            second.read(chunks[1], places[1], other[1] + done, count)
            yield chunks[0][places[0] : places[0] + count], chunks[1][places[1] : places[1] + count]
