"""What all compiled functions share: how Numba is told to compile, dtypes, and copying."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numba import njit

#: Without the two wrappers, which nobody calls, it takes a fifth less time.
PLAIN: Final[dict[str, Any]] = {
    "nogil": True,
    "error_model": "numpy",
    "_nrt": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I16, I32, I64 = np.int16, np.int32, np.int64
FLOAT, DOUBLE = np.float32, np.float64
Array = Any
Convert = Callable[[Any], Any]

#: Codes of dtypes, as in `rv_distributed.kernels.strips.CODES`.
BF16, F16, F32, F64 = 0, 1, 2, 3
WIDTHS: Final = (2, 2, 4, 8)


@njit(**PLAIN)
def copy(source: Array, into: Array) -> None:
    # Numba compiles an assignment to a slice four times as long, for the sake of its error messages.
    for i in range(into.size):
        into[i] = source[i]


@njit(**PLAIN)
def fill(into: Array, value: int) -> None:
    for i in range(into.size):
        into[i] = value


@njit(**PLAIN, inline="always")
def aligned(raw: Array, at: int, count: int, width: int, spare: Array) -> Array:
    """``count`` elements of ``raw`` from byte ``at``: in place, or in ``spare`` where they lie at odd addresses."""
    if at % width == 0:
        return raw[at : at + count * width]
    into = spare[: count * width]
    copy(raw[at : at + count * width], into)
    return into
