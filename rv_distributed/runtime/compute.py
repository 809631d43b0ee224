"""Computing the parts of a chunk: from the arena, block by block through the kernels, into the output buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Final, Protocol

import numpy as np

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.measures import Measures
from rv_distributed.plan import Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.chunks import Computed, Part
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerConfig
from rv_distributed.runtime.requantize import Requantizer

#: A GPU wants few large launches, not blocks of a cache's size.
_CUDA_BLOCK_BYTES: Final = 16 << 20


class Block(Protocol):
    """What computes a block, for one thread at a time."""

    def __call__(
        self,
        span: Span,
        places: Sequence[int],
        weights: Sequence[Weights],
        arena: Bytes,
        outs: Bytes,
        at: int,
        first: int,
        count: int,
    ) -> list[Measures]:
        """Compute elements ``first`` to ``first + count`` of the span's tensor into every row of ``outs``, from byte
        ``at``. ``places`` has, for each of the span's `operands`, where its bytes are in the arena."""
        ...


class PartComputer:
    """Computes parts for one stream. Belongs to one thread at a time."""

    def __init__(self, config: WorkerConfig, device: str) -> None:
        self._config, self._device = config, device
        self._numbers = config.numbers
        self._block_bytes = BLOCK_BYTES if device == "cpu" else _CUDA_BLOCK_BYTES
        self._requantizer = Requantizer(config)
        self._block = _choose_block(config, device, self._block_bytes)

    @cached_property
    def _wide_block(self) -> Block:
        config = replace(self._config, arithmetic=self._config.arithmetic._replace(compute_dtype="float64"))
        return _choose_block(config, self._device, self._block_bytes)

    def compute(self, span: Span, part: Part, arena: Arena, outs: Bytes, start: int) -> Iterator[Computed]:
        """Fill the part's bytes in ``outs``, which has a row an output: the window of the file from byte ``start``.

        Yields every block when it is finished. Blocks end at multiples of their size in the file, so they are
        the same however the file is cut into chunks and pieces.
        """
        if span.requantized is not None:
            arena.decoder.keep_only(span.operands)
            yield from self._requantizer.compute(span, span.requantized, part, arena, outs, start)
            return
        if span.is_opaque:
            arena.need(part.target, part.nbytes)
            outs[:, part.at : part.at + part.nbytes] = arena.array[part.target : part.target + part.nbytes]
            yield Computed(part.at, part.at + part.nbytes, ())
            return
        arena.decoder.keep_only(span.operands)
        weights = [span.weights[number] for number in self._numbers]
        block = self._wide_block if span.is_wide else self._block
        item = item_bytes(span.dtype)
        done = 0
        while done < part.elements:
            place = part.at - part.skip + done * item
            number = (start + place) // BLOCK_BYTES
            border = ((start + place) // self._block_bytes + 1) * self._block_bytes - start
            # A border that cuts through the first element makes it a block: the part before it has measured it.
            is_cut = done == 0 and part.skip > 0
            count = 1 if is_cut else min(max(1, (border - place) // item), part.elements - done)
            places = arena.find(_wanted(span, part, done, count))
            low, high = max(place, part.at), min(place + count * item, part.at + part.nbytes)
            first = part.first + done
            measured = _fill(block, span, places, weights, arena.array, outs, place, low, high, first, count)
            leaves = () if is_cut else tuple((number, found.moved(first)) for found in measured)
            yield Computed(low, high, leaves)
            done += count


def _fill(
    block: Block,
    span: Span,
    places: Sequence[int],
    weights: Sequence[Weights],
    arena: Bytes,
    outs: Bytes,
    place: int,
    low: int,
    high: int,
    first: int,
    count: int,
) -> list[Measures]:
    item = item_bytes(span.dtype)
    if low == place and high == place + count * item and place % item == 0:
        return block(span, places, weights, arena, outs, place, first, count)
    # Elements at odd addresses, or some of their bytes are another part's.
    whole = np.empty((len(outs), count * item), np.uint8)
    measured = block(span, places, weights, arena, whole, 0, first, count)
    outs[:, low:high] = whole[:, low - place : high - place]
    return measured


def _wanted(span: Span, part: Part, done: int, count: int) -> list[tuple[int, int]]:
    """Where elements ``done`` to ``done + count`` of the span's operands have their places, and their bytes."""
    places = [part.target, *(place for places in part.vectors for place in places)]
    items = [item_bytes(source.dtype) if source is not None else 0 for source in span.operands]
    return [(at + done * item, count * item) for at, item in zip(places, items, strict=True)]


def _choose_block(config: WorkerConfig, device: str, block_bytes: int) -> Block:
    if device == "cpu" and config.arithmetic.compute_dtype == "float32":
        from rv_distributed.runtime.compiled_block import CompiledBlock

        return CompiledBlock(config)
    from rv_distributed.runtime.torch_block import TorchBlock

    return TorchBlock(config, device, block_bytes)
