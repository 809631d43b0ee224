"""Blocks through torch, on GPUs.

The operands go over as raw elements and the results come back, on a CUDA stream of the worker's stream. The processor's
torch, which has no such streams, can stand in for a GPU; only tests have it do so.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from rv_distributed.errors import RunError
from rv_distributed.kernels.combine import TORCH_DTYPES, Combiner
from rv_distributed.measures import Measures
from rv_distributed.plan import Source, Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.arena import Found
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.model import WorkerConfig

#: One thread at a time puts a block's kernels into a queue, which is soon done: several would hand the interpreter's
#: lock around between one kernel and the next.
_QUEUEING: Final = threading.Lock()


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "a smaller --memory-budget makes fewer and smaller blocks"
        raise RunError(f"the GPU has too little memory left: {remedy}") from error


class TorchBlock:
    """As `Block`; computes the first block only."""

    copies = False

    @_enough_memory()
    def __init__(self, config: WorkerConfig, device: str, block_bytes: int) -> None:
        # The streams are the parallelism; torch's own threads would only get in their way.
        torch.set_num_threads(1)
        self._device = torch.device(device)
        self._order = config.arithmetic.order
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with self._queue():
            self._combiner = Combiner(
                block_elements=block_bytes // min(dtype.itemsize for dtype in TORCH_DTYPES.values()),
                outputs=len(config.outputs),
                device=self._device,
                weighted=config.weighted,
                stats=config.stats,
                arithmetic=config.arithmetic,
            )

    @_enough_memory()
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
        count = sizes[0]

        def load(start: int, source: Source) -> torch.Tensor:
            dtype = TORCH_DTYPES[source.dtype]
            raw = torch.from_numpy(arena[start : start + count * dtype.itemsize])
            values = (raw if start % dtype.itemsize == 0 else raw.clone()).view(dtype)
            return values if self._stream is None else values.to(self._device, non_blocking=True)

        dtype = TORCH_DTYPES[span.dtype]
        stop = at + count * dtype.itemsize
        raws = [torch.from_numpy(out[at:stop]).view(dtype) for out in outs]
        with self._queue():
            results = raws if self._stream is None else [torch.empty_like(raw, device=self._device) for raw in raws]
            target, *others = [
                load(found.at, source) if source is not None else None
                for found, source in zip(operands, span.operands, strict=True)
            ]
            vectors = [(plus, minus) for plus, minus in zip(others[::2], others[1::2], strict=True) if plus is not None]
            if target is None and self._order == "each":
                measured = [self._combiner.extract(results[0], *vectors[0], name=span.name, first=first)]
            else:
                measured = self._combiner.combine(results, target, vectors, weights, name=span.name, first=first)
            if self._stream is not None:
                for raw, result in zip(raws, results, strict=True):
                    raw.copy_(result, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        return [[of_output.result() for of_output in measured]]

    @contextlib.contextmanager
    def _queue(self) -> Iterator[None]:
        """Where work for the GPU is put into the stream's queue; nothing on a processor."""
        if self._stream is None:
            yield
            return
        with _QUEUEING, torch.cuda.stream(self._stream):
            yield
