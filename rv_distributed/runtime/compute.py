"""Computing the parts of a chunk: from the arena, block by block through the kernels, into the output buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np

from rv_distributed.checkpoint.dtypes import ARITHMETIC, item_bytes
from rv_distributed.measures import Leaf, Measures
from rv_distributed.plan import Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.chunks import Part
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerConfig

#: A GPU wants few large launches, not blocks of a cache's size.
_CUDA_BLOCK_BYTES: Final = 16 << 20


class Block(Protocol):
    """What computes a block, for one thread at a time."""

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
        """Compute elements ``done`` to ``done + count`` of the part into every row of ``outs``, from byte ``at``."""
        ...


class Computed(NamedTuple):
    """A block that is finished."""

    start: int
    """Its first byte in the rows of the output buffers."""
    stop: int
    leaves: tuple[Leaf, ...]
    """Its measures, by output; none where nothing is measured."""


class PartComputer:
    """Computes parts for one stream. Belongs to one thread at a time."""

    def __init__(self, config: WorkerConfig, device: str) -> None:
        self._numbers = config.numbers
        self._block_bytes = BLOCK_BYTES if device == "cpu" else _CUDA_BLOCK_BYTES
        self._block = _choose_block(config, device, self._block_bytes)

    def compute(self, span: Span, part: Part, arena: Arena, outs: Bytes, start: int) -> Iterator[Computed]:
        """Fill the part's bytes in ``outs``, which has a row an output: the window of the file from byte ``start``.

        Yields every block when it is finished. Blocks end at multiples of their size in the file, so they are
        the same however the file is cut into chunks and pieces.
        """
        if span.dtype not in ARITHMETIC:
            arena.need(part.target, part.nbytes)
            outs[:, part.at : part.at + part.nbytes] = arena.array[part.target : part.target + part.nbytes]
            yield Computed(part.at, part.at + part.nbytes, ())
            return
        weights = [span.weights[number] for number in self._numbers]
        item = item_bytes(span.dtype)
        done = 0
        while done < part.elements:
            place = part.at - part.skip + done * item
            number = (start + place) // BLOCK_BYTES
            border = ((start + place) // self._block_bytes + 1) * self._block_bytes - start
            # A border that cuts through the first element makes it a block: the part before it has measured it.
            is_cut = done == 0 and part.skip > 0
            count = 1 if is_cut else min(max(1, (border - place) // item), part.elements - done)
            _fetch(span, part, arena, done, count)
            low, high = max(place, part.at), min(place + count * item, part.at + part.nbytes)
            measured = self._fill(span, part, weights, arena.array, outs, place, low, high, done, count)
            leaves = () if is_cut else tuple((number, found.moved(part.first + done)) for found in measured)
            yield Computed(low, high, leaves)
            done += count

    def _fill(
        self,
        span: Span,
        part: Part,
        weights: Sequence[Weights],
        arena: Bytes,
        outs: Bytes,
        place: int,
        low: int,
        high: int,
        done: int,
        count: int,
    ) -> list[Measures]:
        item = item_bytes(span.dtype)
        if low == place and high == place + count * item and place % item == 0:
            return self._block(span, part, weights, arena, outs, place, done, count)
        # Elements at odd addresses, or some of their bytes are another part's.
        whole = np.empty((len(outs), count * item), np.uint8)
        measured = self._block(span, part, weights, arena, whole, 0, done, count)
        outs[:, low:high] = whole[:, low - place : high - place]
        return measured


def _fetch(span: Span, part: Part, arena: Arena, done: int, count: int) -> None:
    """Wait for elements ``done`` to ``done + count`` of all operands."""
    operands = [(part.target, span.target)]
    for (plus_at, minus_at), vector in zip(part.vectors, span.vectors, strict=True):
        operands += [(plus_at, vector.plus), (minus_at, vector.minus)]
    for at, operand in operands:
        if operand is not None:
            item = item_bytes(operand.dtype)
            arena.need(at + done * item, count * item)


def _choose_block(config: WorkerConfig, device: str, block_bytes: int) -> Block:
    if device == "cpu" and config.arithmetic.compute_dtype == "float32":
        from rv_distributed.runtime.compiled_block import CompiledBlock

        return CompiledBlock(config)
    from rv_distributed.runtime.torch_block import TorchBlock

    return TorchBlock(config, device, block_bytes)
