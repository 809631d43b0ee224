"""How functions are compiled by Numba, and what becomes of the machine code.

Numba's cache looks at the file that a function is in, and not at what it calls: all that an `Entry` calls has to stand
in the same file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from numba import njit

PLAIN: Final[dict[str, Any]] = {"nogil": True, "error_model": "numpy", "_nrt": False}


class Entry:
    """A function that is compiled when it is first called, or taken from Numba's cache.

    The cache is a folder beside this file, or in the user's own, or nowhere; it may be full, or damaged by a power cut.
    None of that is a reason to fail: then the machine code is made anew, and not kept.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        self._ready = False
        try:
            self._compiled = njit(cache=True, **PLAIN)(function)
        except RuntimeError:
            self._compiled = njit(**PLAIN)(function)

    def __call__(self, *args: object) -> None:
        if self._ready:
            self._compiled(*args)
            return
        try:
            self._compiled(*args)
        except Exception:
            # Nothing has run yet: what is compiled raises no exception.
            self._compiled = njit(**PLAIN)(self._function)
            self._compiled(*args)
        self._ready = True
