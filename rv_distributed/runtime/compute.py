"""Computing the parts of a chunk: from the arena, block by block through the kernels, into the output buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from rv_distributed.checkpoint.dtypes import ARITHMETIC, item_bytes
from rv_distributed.measures import Leaf, Measures
from rv_distributed.plan import Span
from rv_distributed.runtime.chunks import Part
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerConfig

Bytes = npt.NDArray[np.uint8]
#: A GPU wants few large launches, not blocks of a cache's size.
_CUDA_BLOCK_BYTES: Final = 16 << 20


class Block(Protocol):
    """What computes a block, for one thread at a time."""

    def __call__(
        self,
        span: Span,
        part: Part,
        alphas: list[list[float]],
        arena: Bytes,
        outs: Bytes,
        at: int,
        done: int,
        count: int,
    ) -> list[Measures]:
        """Compute elements ``done`` to ``done + count`` of the part into every row of ``outs``, from byte ``at``."""
        ...


class PartComputer:
    """Computes parts for one stream. Belongs to one thread at a time."""

    def __init__(self, config: WorkerConfig, device: str) -> None:
        self._alphas = config.alphas
        self._block_bytes = BLOCK_BYTES if device == "cpu" else _CUDA_BLOCK_BYTES
        self._block = _choose_block(config, device, self._block_bytes)

    def compute(self, span: Span, part: Part, arena: Bytes, outs: Bytes, start: int) -> Sequence[Sequence[Leaf]]:
        """Fill the part's bytes in ``outs``, which has a row an output: the window of the file from byte ``start``.

        Returns the measures of its blocks, by output. Blocks end at multiples of their size in the file, so they are
        the same however the file is cut into chunks and pieces.
        """
        if span.dtype not in ARITHMETIC:
            outs[:, part.at : part.at + part.nbytes] = arena[part.target : part.target + part.nbytes]
            return [[] for _ in outs]
        alphas = [[row[operand.vector] for operand in span.vectors] for row in self._alphas]
        leaves: list[list[Leaf]] = [[] for _ in outs]
        item = item_bytes(span.dtype)
        done = 0
        while done < part.elements:
            place = part.at - part.skip + done * item
            number = (start + place) // BLOCK_BYTES
            if done == 0 and part.skip:
                # A border cut through this element: the part before it has measured it.
                self._fill(span, part, alphas, arena, outs, 0, 1)
                done = 1
                continue
            border = ((start + place) // self._block_bytes + 1) * self._block_bytes - start
            count = min(max(1, (border - place) // item), part.elements - done)
            measured = self._fill(span, part, alphas, arena, outs, done, count)
            for found, more in zip(leaves, measured, strict=True):
                found.append((number, more.moved(part.first + done)))
            done += count
        return leaves

    def _fill(
        self, span: Span, part: Part, alphas: list[list[float]], arena: Bytes, outs: Bytes, done: int, count: int
    ) -> list[Measures]:
        item = item_bytes(span.dtype)
        place = part.at - part.skip + done * item
        low, high = max(place, part.at), min(place + count * item, part.at + part.nbytes)
        if low == place and high == place + count * item and place % item == 0:
            return self._block(span, part, alphas, arena, outs, place, done, count)
        # Elements at odd addresses, or some of their bytes are another part's.
        whole = np.empty((len(outs), count * item), np.uint8)
        measured = self._block(span, part, alphas, arena, whole, 0, done, count)
        outs[:, low:high] = whole[:, low - place : high - place]
        return measured


def _choose_block(config: WorkerConfig, device: str, block_bytes: int) -> Block:
    if device == "cpu" and config.arithmetic.compute_dtype == "float32":
        from rv_distributed.runtime.compiled_block import CompiledBlock

        return CompiledBlock(config)
    from rv_distributed.runtime.torch_block import TorchBlock

    return TorchBlock(config, device, block_bytes)
