"""Computing the parts of a chunk: from the arena, block by block through the kernels, into the output buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Final, Protocol

import numpy as np

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.measures import Leaf, Measures
from rv_distributed.plan import Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.arena import Arena, Found
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.chunks import Computed, Part
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerConfig
from rv_distributed.runtime.requantize import Requantizer

#: A GPU wants few large launches, not blocks of a cache's size.
_CUDA_BLOCK_BYTES: Final = 16 << 20


class Block(Protocol):
    """What computes blocks, for one thread at a time."""

    copies: bool
    """Whether it copies operands out of the page cache itself."""

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
        """Compute blocks of ``sizes`` elements, one after another, from element ``first`` of the span's tensor, into
        every row of ``outs``, from byte ``at``. ``operands`` says where each of the span's `operands` is.

        Returns the measures of each output, by block: of fewer when the page cache does not hold an operand, but of
        one at least when none comes from there.
        """
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

        Yields blocks when they are finished. They end at multiples of their size in the file, so they are the same
        however the file is cut into chunks and pieces.
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
        item = item_bytes(span.dtype)
        done = 0
        while done < part.elements:
            place = part.at - part.skip + done * item
            # A border that cuts through the first element makes it a block: the part before it has measured it.
            is_cut = done == 0 and part.skip > 0
            sizes = [1] if is_cut else self._sizes(start + place, item, part.elements - done)
            measured = self._several(span, part, arena, outs, place, done, sizes)
            if not measured:
                measured = [self._one(span, part, arena, outs, place, done, sizes[0])]
            count = sum(sizes[: len(measured)])
            low, high = max(place, part.at), min(place + count * item, part.at + part.nbytes)
            leaves = _leaves(measured, sizes, part.first + done, start + place, item)
            yield Computed(low, high, () if is_cut else leaves)
            done += count

    def _sizes(self, place: int, item: int, elements: int) -> list[int]:
        """Of the blocks that some elements make, which begin at byte ``place`` of the file."""
        sizes: list[int] = []
        while elements:
            border = (place // self._block_bytes + 1) * self._block_bytes
            sizes.append(min(max(1, (border - place) // item), elements))
            place, elements = place + sizes[-1] * item, elements - sizes[-1]
        return sizes

    def _several(
        self, span: Span, part: Part, arena: Arena, outs: Bytes, place: int, done: int, sizes: Sequence[int]
    ) -> list[list[Measures]]:
        """Compute blocks from element ``done`` of the part on whose operands are at hand: none, when that is all that
        can be done without waiting, without decoding, and without a look at odd addresses."""
        block, item = self._block_for(span), item_bytes(span.dtype)
        if not block.copies or place < part.at or place % item:
            return []
        inside = (part.at + part.nbytes - place) // item
        sizes = [size for size, end in zip(sizes, accumulate(sizes), strict=True) if end <= inside]
        wanted = _wanted(span, part, done, sum(sizes))
        largest = [nbytes for _, nbytes in _wanted(span, part, done, max(sizes, default=0))]
        found = arena.at_hand(wanted, largest) if sizes else None
        if found is None:
            return []
        first = part.first + done
        measured = block(span, found, self._weights(span), arena.array, outs, place, first, sizes)
        count = sum(sizes[: len(measured)])
        copied = [nbytes for (_, nbytes), of in zip(_wanted(span, part, done, count), found, strict=True) if of.fd >= 0]
        arena.bytes_read += sum(copied)
        return measured

    def _one(
        self, span: Span, part: Part, arena: Arena, outs: Bytes, place: int, done: int, count: int
    ) -> list[Measures]:
        """Compute the block of ``count`` elements from element ``done`` of the part."""
        wanted = _wanted(span, part, done, count)
        for at, nbytes in wanted:
            if at >= 0:
                arena.need(at, nbytes)
        found = [Found(at) for at, _ in wanted]
        block, weights, first = self._block_for(span), self._weights(span), part.first + done
        item = item_bytes(span.dtype)
        low, high = max(place, part.at), min(place + count * item, part.at + part.nbytes)
        if high - low == count * item and place % item == 0:
            return block(span, found, weights, arena.array, outs, place, first, [count])[0]
        # Elements at odd addresses, or some of their bytes are another part's.
        whole = np.empty((len(outs), count * item), np.uint8)
        (measured,) = block(span, found, weights, arena.array, whole, 0, first, [count])
        outs[:, low:high] = whole[:, low - place : high - place]
        return measured

    def _block_for(self, span: Span) -> Block:
        return self._wide_block if span.is_wide else self._block

    def _weights(self, span: Span) -> list[Weights]:
        return [span.weights[number] for number in self._numbers]


def _wanted(span: Span, part: Part, done: int, count: int) -> list[tuple[int, int]]:
    """Where elements ``done`` to ``done + count`` of the span's operands have their places, and their bytes."""
    places = [part.target, *(place for places in part.vectors for place in places)]
    items = [item_bytes(source.dtype) if source is not None else 0 for source in span.operands]
    return [(at + done * item, count * item) for at, item in zip(places, items, strict=True)]


def _leaves(
    measured: Sequence[Sequence[Measures]], sizes: Sequence[int], first: int, place: int, item: int
) -> tuple[tuple[Leaf, ...], ...]:
    """By output, the measures of blocks that begin at element ``first`` of a tensor and byte ``place`` of the file."""
    by_block = []
    for of_block, count in zip(measured, sizes, strict=False):
        by_block.append([(place // BLOCK_BYTES, found.moved(first)) for found in of_block])
        first, place = first + count, place + count * item
    return tuple(zip(*by_block, strict=True))


def _choose_block(config: WorkerConfig, device: str, block_bytes: int) -> Block:
    if device == "cpu" and config.arithmetic.compute_dtype == "float32":
        from rv_distributed.runtime.compiled_block import CompiledBlock

        return CompiledBlock(config)
    from rv_distributed.runtime.torch_block import TorchBlock

    return TorchBlock(config, device, block_bytes)
