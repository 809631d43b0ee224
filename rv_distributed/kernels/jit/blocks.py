"""Several blocks at once, with their operands copied out of the page cache just before: all without Python."""

from __future__ import annotations

import os
from typing import Any

from numba import njit, types

from rv_distributed.kernels.jit.combine import combine
from rv_distributed.kernels.jit.common import PLAIN, WIDTHS, Array
from rv_distributed.kernels.strips import NO_TENSOR

_combine = njit(**PLAIN)(combine)

if hasattr(os, "RWF_NOWAIT"):
    _NOWAIT = os.RWF_NOWAIT
    # ssize_t preadv2(int fd, const struct iovec *iov, int iovcnt, off_t offset, int flags)
    _preadv2 = types.ExternalFunction(
        "preadv2", types.int64(types.int32, types.uintp, types.int32, types.int64, types.int32)
    )

    @njit(**PLAIN)
    def _read(fd: int, offset: int, into: Array, window: Array) -> Any:
        """Fill ``into`` from the page cache; whether all of it was there. ``window`` (int64) is scratch, of two."""
        done = 0
        while done < into.size:
            window[0], window[1] = into.ctypes.data + done, into.size - done
            count = _preadv2(fd, window.ctypes.data, 1, offset + done, _NOWAIT)
            if count <= 0:
                return False
            done += count
        return True

else:

    @njit(**PLAIN)
    def _read(fd: int, offset: int, into: Array, window: Array) -> Any:  # noqa: ARG001 - nothing can be had
        return False


@njit(**PLAIN)
def _find(arena: Array, operands: Array, done: int, count: int, places: Array, window: Array) -> Any:
    """Where ``count`` elements after ``done`` of every operand are, into ``places``; whether they are there."""
    for number in range(operands.shape[0]):
        at, code, fd, offset = operands[number]
        if code == NO_TENSOR:
            continue
        width = WIDTHS[code]
        if fd < 0:
            places[number] = at + done * width
        elif _read(fd, offset + done * width, arena[at : at + count * width], window):
            places[number] = at
        else:
            return False
    return True


def combine_blocks(
    arena: Array,
    operands: Array,
    alphas: Array,
    after: Array,
    fused: bool,
    outs: Array,
    at: int,
    code: int,
    first_element: int,
    sizes: Array,
    keys: Array,
    weighted: bool,
    level: int,
    scratch: Array,
    spare: Array,
    steps: Array,
    sums: Array,
    counts: Array,
    places: Array,
    vectors: Array,
    made: Array,
) -> None:
    """As `combine`, for blocks of ``sizes`` (int64) elements, one after another; ``made`` (int64) gets how many of them
    were computed: the first whose operands are not all at hand is the end.

    ``operands`` (int64) has a row ``at, code, fd, offset`` for the target, and for plus and minus of each vector. They
    begin at ``at`` in the arena; or each block is copied there, when there is a file descriptor, from the page cache,
    where the first begins at ``offset`` of the file. ``sums`` and ``counts`` have a row a block. ``places`` (int64) is
    scratch for a number an operand, and two; ``vectors`` (int64) for four a vector.
    """
    width, done = WIDTHS[code], 0
    window = places[operands.shape[0] :]
    for block in range(sizes.size):
        if not _find(arena, operands, done, sizes[block], places, window):
            break
        for number in range(vectors.shape[0]):
            plus, minus = 1 + 2 * number, 2 + 2 * number
            vectors[number, 0], vectors[number, 1] = places[plus], operands[plus, 1]
            vectors[number, 2], vectors[number, 3] = places[minus], operands[minus, 1]
        _combine(
            arena,
            places[0],
            operands[0, 1],
            vectors,
            alphas,
            after,
            fused,
            outs,
            at + done * width,
            code,
            first_element + done,
            sizes[block],
            keys,
            weighted,
            level,
            scratch,
            spare,
            steps,
            sums[block],
            counts[block],
        )
        done += sizes[block]
        made[0] = block + 1
