"""Functions of `rv_distributed.kernels.jit` as machine code, which is made once for a processor and then kept.

Numba makes it. Where it is there already, neither Numba is imported, which takes half a second, nor what it compiles:
LLVM links the code into the process, and it is called as a C function is, without Python's lock.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np
from blake3 import blake3

from rv_distributed.logs import COMPILING

#: What an argument is: the dtype of an array and its dimensions, or the dtype of a number and 0.
Kind = tuple[str, int]

_SOURCES: Final = Path(__file__).parent
_C_TYPES: Final[dict[str, Any]] = {"<i8": ctypes.c_int64, "<f4": ctypes.c_float, "<f8": ctypes.c_double}
_DIGEST_BYTES: Final = 32
_MAKING: Final = threading.Lock()
_LOG = logging.getLogger(COMPILING)


class Entry:
    """A function of ``rv_distributed.kernels.jit.<module>``.

    Arguments are numbers and contiguous arrays. What kinds they are decides what is compiled, when it is first called
    with such ones. The machine code is kept in the user's cache folder, which may be missing, full, or damaged by a
    power cut. None of that is a reason to fail: then it is made anew, and not kept.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name
        self._made: dict[tuple[Kind, ...], Callable[..., None]] = {}

    def __call__(self, *args: Any) -> None:
        kinds = tuple(map(_kind, args))
        function = self._made.get(kinds) or self._make(kinds)
        function(*chain.from_iterable(map(_words, args)))

    def _make(self, kinds: tuple[Kind, ...]) -> Callable[..., None]:
        with _MAKING:
            if kinds not in self._made:
                name = f"{self._name}-{_stamp(kinds)}.o"
                code = _kept(name) or self._compile(kinds, name)
                self._made[kinds] = _linked(code, self._name, kinds)
        return self._made[kinds]

    def _compile(self, kinds: tuple[Kind, ...], keep_as: str) -> bytes:
        from rv_distributed.kernels.jit.build import build

        _LOG.info("compiling %s for this processor, which takes some seconds, once", self._name)
        code = build(self._module, self._name, kinds, _machine())
        _keep(keep_as, code)
        return code


def _kind(arg: Any) -> Kind:
    if isinstance(arg, np.ndarray):
        return arg.dtype.str, arg.ndim
    if isinstance(arg, int):
        return "<i8", 0
    if isinstance(arg, np.float32 | float):
        return ("<f4", 0) if isinstance(arg, np.float32) else ("<f8", 0)
    raise TypeError(f"{type(arg).__name__} is nothing that compiled code takes")


def _words(arg: Any) -> tuple[Any, ...]:
    """An argument as C has it: a number, or an array's address and its sizes."""
    if not isinstance(arg, np.ndarray):
        return (arg,)
    if not arg.flags.c_contiguous:
        raise ValueError("an array that is not contiguous")
    return arg.ctypes.data, *arg.shape


def _linked(code: bytes, name: str, kinds: tuple[Kind, ...]) -> Callable[..., None]:
    """The function ``name`` of an object file, ready to be called with addresses, sizes and numbers."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    c_types: list[Any] = []
    for dtype, dimensions in kinds:
        c_types += [ctypes.c_void_p, *[ctypes.c_int64] * dimensions] if dimensions else [_C_TYPES[dtype]]
    address = engine.get_function_address(name)
    # Else the code would go with the last reference to it, while a thread that hangs may still be in it.
    engine.detach()
    return ctypes.CFUNCTYPE(None, *c_types)(address)


def _machine() -> llvm.TargetMachine:
    """A new one: what it is handed to ends it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _processor()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, codemodel="jitdefault", jit=True
    )


@cache
def _processor() -> tuple[str, str]:
    """Its name and its features, as LLVM has them."""
    try:
        return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    except RuntimeError:
        return "generic", ""


@cache
def _stamp(kinds: tuple[Kind, ...]) -> str:
    """What the machine code depends on: our sources, what compiles them and how, the processor, and the arguments."""
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    about = sys.version, version("numba"), settings, llvm.llvm_version_info, _processor(), kinds
    hasher = blake3(repr(about).encode())
    for path in sorted(_SOURCES.rglob("*.py")):
        hasher.update(path.read_bytes())
    return hasher.hexdigest(16)


def _place(name: str) -> Path:
    """Where machine code is kept. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rv_distributed" / name


def _kept(name: str) -> bytes:
    """Machine code of an earlier process; none where there is none, or it is damaged."""
    with suppress(OSError, RuntimeError):
        kept = _place(name).read_bytes()
        digest, code = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
        if digest == blake3(code).digest():
            return code
    return b""


def _keep(name: str, code: bytes) -> None:
    """Keep machine code for other processes, if it can be."""
    with suppress(OSError, RuntimeError):
        path = _place(name)
        # It will be run: nobody else may put anything there, whatever the umask is.
        path.parent.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(blake3(code).digest() + code)
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
