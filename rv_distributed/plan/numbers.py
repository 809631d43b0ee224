"""From tensors as a checkpoint stores them to tensors as they are computed with: FP8 weights with their scales, and
weights with their adapter, become one tensor each, whose source says how it is decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from rv_distributed.checkpoint.adapter import adapted
from rv_distributed.checkpoint.dtypes import ARITHMETIC
from rv_distributed.checkpoint.fp8 import dequantized, fp8_scheme
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import Gathered, LowRank, Source
from rv_distributed.errors import Problem

#: Why a tensor gets nothing from a vector whose donor and reference are one checkpoint, with and without an adapter.
NO_ADAPTER: Final = "not changed by the adapter"


def as_numbers(checkpoint: Checkpoint) -> tuple[Checkpoint, list[Problem]]:
    """The same checkpoint, with tensors as they are computed with, and what is wrong with what they are decoded from."""
    tensors, problems = dequantized(checkpoint)
    found = replace(checkpoint, tensors=tensors)
    if checkpoint.adapter is not None and not problems:
        tensors, problems = adapted(found, checkpoint.adapter)
    return replace(checkpoint, tensors=tensors), problems
