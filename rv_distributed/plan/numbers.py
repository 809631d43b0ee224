"""From tensors as a checkpoint stores them to tensors as they are computed with: an FP8 weight and its scales, or a
weight and its adapter, become one tensor, whose source says how it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rv_distributed.checkpoint.adapter import adapted
from rv_distributed.checkpoint.dtypes import ARITHMETIC
from rv_distributed.checkpoint.fp8 import dequantized
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import BlockScaled, Gathered, LowRank, Source, shifted
from rv_distributed.errors import Problem
from rv_distributed.plan.model import VectorOperand

#: Why a tensor gets nothing of a vector whose two checkpoints have it from the same place.
SAME: Final = "the same in donor and reference"


def as_numbers(checkpoints: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """The same checkpoints, with tensors as they are computed with, and what is wrong with those that are stored."""
    found: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    for name, checkpoint in checkpoints.items():
        tensors, wrong = dequantized(checkpoint)
        found[name] = replace(checkpoint, tensors=tensors)
        if checkpoint.adapter is not None and not wrong:
            tensors, wrong = adapted(found[name], checkpoint.adapter)
            found[name] = replace(checkpoint, tensors=tensors)
        problems += wrong
    return found, problems


def is_stored(tensor: Tensor) -> bool:
    """Whether a tensor's values are those that lie in files, byte for byte."""
    return not isinstance(tensor.source, BlockScaled | LowRank)


def copied(checkpoint: Checkpoint, tensor: Tensor) -> Source:
    """What the bytes of a tensor are copied from, whatever its dtype."""
    source = checkpoint.source(tensor)
    return source.as_bytes() if isinstance(source, Gathered) and tensor.dtype not in ARITHMETIC else source


def difference(vector: int, plus: Source, minus: Source | None) -> VectorOperand | None:
    """``plus − minus``, or None when both are the same.

    A base that both stand on is left out of both: ``(base + δ) − base`` is δ, as it was computed, and the base is not
    even read.
    """
    if plus == minus:
        return None
    of_plus, of_minus = _base(plus), _base(minus)
    if minus is None or of_plus != of_minus:
        return VectorOperand(vector, plus, minus)
    added = plus._replace(base=None) if isinstance(plus, LowRank) else None
    taken = minus._replace(base=None) if isinstance(minus, LowRank) else None
    if added is None and taken is not None:
        return VectorOperand(vector, taken._replace(scale=-taken.scale), None)
    return VectorOperand(vector, added or plus, taken)


def _base(source: Source | None) -> Source | None:
    """What an adapter is added to, from the same element on; of what has none, itself."""
    if not isinstance(source, LowRank):
        return source
    return source.base and shifted(source.base, source.first)
