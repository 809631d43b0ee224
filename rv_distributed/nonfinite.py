"""What to say of NaN and infinity in an output: which tensor, where, and which of the inputs brought it."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Final

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.table import TensorRow
from rv_distributed.errors import NonFiniteError, Problem
from rv_distributed.plan import Operand, Plan, TensorPlan
from rv_distributed.storage import open_reader

_MOST_SHOWN: Final = 20
_REMEDY: Final = "Repair the checkpoint; or run again with --allow-nonfinite, which publishes what is finished already."


def check_finite(plan: Plan, out: str, rows: Iterable[TensorRow]) -> None:
    """Raise NonFiniteError when an output holds NaN or infinity. ``rows`` are those of the plan's tensors, in order."""
    problems = list(_problems(plan, out, rows))
    if len(problems) > _MOST_SHOWN:
        more = len(problems) - _MOST_SHOWN
        problems[_MOST_SHOWN:] = [Problem(out, f"{more} more tensors have elements that are NaN or infinite", _REMEDY)]
    if problems:
        raise NonFiniteError(problems)


def _problems(plan: Plan, out: str, rows: Iterable[TensorRow]) -> Iterator[Problem]:
    for tensor, row in zip(plan.tensors, rows, strict=True):
        if row.first_nonfinite is None:
            continue
        count = f"{row.nan + row.infinite} of {math.prod(row.shape)} elements are NaN or infinite in {out}"
        sources = [(role, operand, _element(operand, row.first_nonfinite)) for role, operand in _operands(tensor)]
        found = ", ".join(f"{role} {value}" for role, _, value in sources)
        where = next((operand.path for _, operand, value in sources if not math.isfinite(value)), out)
        why = "" if where != out else f"; the sum is too large for {row.dtype}"
        yield Problem(where, f"{count}, the first at index {row.first_nonfinite} ({found}){why}", _REMEDY, row.name)


def _operands(tensor: TensorPlan) -> Iterator[tuple[str, Operand]]:
    if tensor.target is not None:
        yield "target", tensor.target
    for vector in tensor.vectors:
        if vector.minus is None:
            yield "vector" if tensor.target is not None else "model", vector.plus
        else:
            yield "donor", vector.plus
            yield "reference", vector.minus


def _element(operand: Operand, index: int) -> float:
    """One element of a source tensor, of one of the dtypes that arithmetic reads. Raises OSError."""
    width = item_bytes(operand.dtype)
    raw = bytearray(width)
    with closing(open_reader(operand.path)) as reader:
        reader.read(memoryview(raw), 0, operand.offset + index * width, width)
    if operand.dtype == "BF16":
        raw[:0] = bytes(2)
    value: float = struct.unpack("<e" if operand.dtype == "F16" else "<f", raw)[0]
    return value
