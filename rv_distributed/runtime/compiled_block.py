"""Blocks through the compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.kernels.compiled import CompiledCombiner, RawOperand
from rv_distributed.measures import Measures
from rv_distributed.plan import Source, Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.chunks import Part
from rv_distributed.runtime.model import WorkerConfig


class CompiledBlock:
    """As `Block`."""

    def __init__(self, config: WorkerConfig) -> None:
        self._combiner = CompiledCombiner(
            outputs=len(config.outputs),
            weighted=config.weighted,
            stats=config.stats,
            arithmetic=config.arithmetic,
        )

    def __call__(
        self,
        span: Span,
        part: Part,
        weights: Sequence[Weights],
        arena: Bytes,
        outs: Bytes,
        at: int,
        done: int,
        count: int,
    ) -> list[Measures]:
        def raw(place: int, operand: Source) -> RawOperand:
            return RawOperand(place + done * item_bytes(operand.dtype), operand.dtype)

        return self._combiner.compute(
            arena,
            raw(part.target, span.target) if span.target else None,
            [
                (raw(plus_at, operand.plus), raw(minus_at, operand.minus) if operand.minus else None)
                for operand, (plus_at, minus_at) in zip(span.vectors, part.vectors, strict=True)
            ],
            weights,
            outs,
            at,
            span.dtype,
            name=span.name,
            first=part.first + done,
            count=count,
        )
