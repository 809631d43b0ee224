"""What to say of NaN and infinity in an output: which tensor, where, and which of the inputs brought it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.sources import path_of
from rv_distributed.checkpoint.table import TensorRow
from rv_distributed.errors import NonFiniteError, Problem
from rv_distributed.plan import Plan
from rv_distributed.runtime.decoding import element_of

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
        first = row.first_nonfinite
        at = first * item_bytes(tensor.dtype)
        segment = next(segment for segment in tensor.segments if at < segment.stop)
        sources = [(role, source, element_of(source, first)) for role, source in segment.by_role]
        found = ", ".join(f"{role} {value}" for role, _, value in sources)
        where = next((path_of(source, first) for _, source, value in sources if not math.isfinite(value)), out)
        why = "" if where != out else f"; the sum is too large for {row.dtype}"
        yield Problem(where, f"{count}, the first at index {row.first_nonfinite} ({found}){why}", _REMEDY, row.name)
