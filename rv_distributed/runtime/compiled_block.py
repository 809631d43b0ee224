"""Blocks through the compiled kernel."""

from __future__ import annotations

from collections.abc import Sequence

from rv_distributed.kernels.compiled import CompiledCombiner, RawOperand
from rv_distributed.measures import Measures
from rv_distributed.plan import Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.arena import Found
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.model import WorkerConfig


class CompiledBlock:
    """As `Block`."""

    copies = True

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
        operands: Sequence[Found],
        weights: Sequence[Weights],
        arena: Bytes,
        outs: Bytes,
        at: int,
        first: int,
        sizes: Sequence[int],
    ) -> list[list[Measures]]:
        target, *others = [
            RawOperand(found.at, source.dtype, found.fd, found.offset) if source is not None else None
            for found, source in zip(operands, span.operands, strict=True)
        ]
        return self._combiner.compute(
            arena,
            target,
            [(plus, minus) for plus, minus in zip(others[::2], others[1::2], strict=True) if plus is not None],
            weights,
            outs,
            at,
            span.dtype,
            name=span.name,
            first=first,
            sizes=sizes,
        )
