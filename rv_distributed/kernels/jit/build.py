"""Machine code out of the functions beside this module: objects that need nothing of Numba's, nor of Python's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

import llvmlite.binding as llvm
import numba
import numpy as np

from rv_distributed.kernels.jit.common import PLAIN

#: How the names begin of what Python and Numba's runtime have.
_OF_PYTHON: Final = ("Py", "_Py", "NRT_", "numba_")


def build(module: str, name: str, kinds: Sequence[tuple[str, int]], machine: llvm.TargetMachine) -> bytes:
    """An object file with the function ``name`` of a module beside this one, for arguments of these kinds.

    It takes them as C does: of an array its address, and its size in each dimension.
    """
    function = getattr(import_module(f"{__package__}.{module}"), name)
    signature: list[Any] = []
    for dtype, dimensions in kinds:
        scalar = numba.from_dtype(np.dtype(dtype))
        signature += [numba.types.CPointer(scalar), *[numba.int64] * dimensions] if dimensions else [scalar]
    compiled = numba.cfunc(numba.void(*signature), error_model="numpy")(_of_c(function, kinds))
    code = llvm.parse_assembly(compiled.inspect_llvm())
    code.get_function(compiled.native_name).name = name
    code.link_in(llvm.parse_assembly(_without_python(code)))
    emitted: bytes = machine.emit_object(code)
    return emitted


def _of_c(function: Callable[..., None], kinds: Sequence[tuple[str, int]]) -> Callable[..., None]:
    """The function with the arguments of C."""
    parameters, arguments = [], []
    for number, (_, dimensions) in enumerate(kinds):
        sizes = [f"n{number}_{dimension}" for dimension in range(dimensions)]
        parameters += [f"a{number}", *sizes]
        arguments.append(f"carray(a{number}, ({', '.join(sizes)},))" if dimensions else f"a{number}")
    space: dict[str, Any] = {"carray": numba.carray, "function": numba.njit(**PLAIN)(function)}
    # Numba wants as many parameters as there are arguments, by name. The text is made of numbers only.
    exec(f"def of_c({', '.join(parameters)}):\n    function({', '.join(arguments)})", space)  # noqa: S102
    made: Callable[..., None] = space["of_c"]
    return made


def _without_python(code: llvm.ModuleRef) -> str:
    """Stand-ins for what the code would call, and look at, to raise an exception: nothing of ours raises any."""
    functions = [f.name for f in code.functions if f.is_declaration and f.name.startswith(_OF_PYTHON)]
    variables = [v.name for v in code.global_variables if v.is_declaration and v.name.startswith(_OF_PYTHON)]
    trap = "call void @llvm.trap()\n  unreachable"
    lines = [f"define void @{name}() {{\n  {trap}\n}}" for name in functions]
    lines += [f"@{name} = global ptr null" for name in variables]
    return "\n".join([f'target triple = "{code.triple}"', "declare void @llvm.trap()", *lines])
