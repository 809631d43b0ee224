"""Computing the parts of a chunk: from the arena, through the kernels, into the output buffers.

The one place that knows the device: on CUDA the operands go over as raw elements and the results come
back, on the stream's own CUDA stream; the kernels in between are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import torch

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.kernels import Combiner
from rv_distributed.kernels.combine import TORCH_DTYPES
from rv_distributed.measures import Measures
from rv_distributed.plan import Operand, Span
from rv_distributed.runtime.buffers import Buffer
from rv_distributed.runtime.chunks import Part
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerConfig

#: A GPU wants few large launches, not blocks of a cache's size.
_CUDA_BLOCK_BYTES: Final = 16 << 20


class PartComputer:
    """Computes parts for one stream. Belongs to one thread at a time."""

    def __init__(self, config: WorkerConfig, device: torch.device) -> None:
        self._device = device
        self._alphas = config.alphas
        self._block_bytes = BLOCK_BYTES if device.type == "cpu" else _CUDA_BLOCK_BYTES
        self._combiner = Combiner(
            block_elements=self._block_bytes // min(dtype.itemsize for dtype in TORCH_DTYPES.values()),
            outputs=len(config.outputs),
            device=device,
            measure=config.measure,
            weighted=len(config.alphas[0]) > 1,
            arithmetic=config.arithmetic,
        )
        self._cuda_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def compute(
        self, span: Span, part: Part, arena: Buffer, outs: Sequence[Buffer], totals: list[Measures]
    ) -> list[Measures]:
        """Fill the part's bytes in each output buffer; ``totals`` of the span so far, by output, and the part's.

        Block after block is added to the totals, so that the sums do not depend on how a span is cut in parts.
        """
        if span.dtype not in TORCH_DTYPES:
            source = arena.view[part.target : part.target + part.nbytes]
            for out in outs:
                out.view[part.at : part.at + part.nbytes] = source
            return totals
        alphas = [[row[operand.vector] for operand in span.vectors] for row in self._alphas]
        item = item_bytes(span.dtype)
        done = 0
        with torch.cuda.stream(self._cuda_stream) if self._cuda_stream is not None else contextlib.nullcontext():
            while done < part.elements:
                # Blocks end at multiples of their size in the file, so the sums over them are always the same.
                place = part.at - part.skip + done * item
                border = (place // self._block_bytes + 1) * self._block_bytes
                count = min(max(1, (border - place) // item), part.elements - done)
                if done == 0 and part.skip:
                    # A border cut through this element: the part before it has measured it.
                    self._block(span, part, alphas, arena, outs, 0, 1)
                    done = 1
                    continue
                measured = self._block(span, part, alphas, arena, outs, done, count)
                totals = [
                    total.plus(_moved(more, part.first + done)) for total, more in zip(totals, measured, strict=True)
                ]
                done += count
            if self._cuda_stream is not None:
                self._cuda_stream.synchronize()
        return totals

    def _block(
        self,
        span: Span,
        part: Part,
        alphas: list[list[float]],
        arena: Buffer,
        outs: Sequence[Buffer],
        done: int,
        count: int,
    ) -> list[Measures]:
        """Compute elements ``done`` to ``done + count`` of the part."""

        def load(at: int, operand: Operand) -> torch.Tensor:
            dtype = TORCH_DTYPES[operand.dtype]
            values = arena.tensor(at + done * dtype.itemsize, count, dtype)
            return values if self._cuda_stream is None else values.to(self._device, non_blocking=True)

        dtype = TORCH_DTYPES[span.dtype]
        place = part.at - part.skip + done * dtype.itemsize
        low, high = max(place, part.at), min(place + count * dtype.itemsize, part.at + part.nbytes)
        whole = place == low and place + count * dtype.itemsize == high and place % dtype.itemsize == 0
        in_place = whole and self._cuda_stream is None
        results = [
            out.tensor(place, count, dtype) if in_place else torch.empty(count, dtype=dtype, device=self._device)
            for out in outs
        ]
        vectors = [
            (load(plus_at, operand.plus), load(minus_at, operand.minus) if operand.minus else None)
            for operand, (plus_at, minus_at) in zip(span.vectors, part.vectors, strict=True)
        ]
        if span.target is None:
            measured = [self._combiner.extract(results[0], *vectors[0], name=span.name, first=part.first + done)]
        else:
            target = load(part.target, span.target)
            measured = self._combiner.combine(results, target, vectors, alphas, name=span.name, first=part.first + done)
        if not in_place:
            for out, result in zip(outs, results, strict=True):
                raw = result.view(torch.uint8)[low - place : high - place]
                out.tensor(low, high - low, torch.uint8).copy_(raw, non_blocking=True)
        return measured


def _moved(measures: Measures, first: int) -> Measures:
    """The measures of a block that begins at element ``first`` of its tensor."""
    if measures.first_nonfinite is None:
        return measures
    return measures._replace(first_nonfinite=first + measures.first_nonfinite)
