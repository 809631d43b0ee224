"""Computing the parts of a chunk: from the arena, block by block through the kernels, into the output buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Final, NamedTuple, Protocol

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

#: A GPU wants few large launches, not blocks of a cache's size: whole chunks, up to this.
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
        self._block_bytes = BLOCK_BYTES if device == "cpu" else min(_CUDA_BLOCK_BYTES, config.chunk_bytes)
        self._requantizer = Requantizer(config)
        self._block = _choose_block(config, device, self._block_bytes)

    @cached_property
    def _wide_block(self) -> Block:
        config = replace(self._config, arithmetic=self._config.arithmetic._replace(compute_dtype="float64"))
        return _choose_block(config, self._device, self._block_bytes)

    def compute(self, span: Span, part: Part, arena: Arena, outs: Bytes, start: int) -> Iterator[Computed]:
        """Fill the part's bytes in ``outs``, which has a row an output: the window of the file from byte ``start``.

        Yields blocks when they are finished. They end at multiples of their size in the file, so those of a processor
        are the same however the file is cut into chunks and pieces.
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
        block = self._wide_block if span.is_wide else self._block
        work = _Work(block, span, part, [span.weights[number] for number in self._numbers], arena, outs)
        item, done = work.item, 0
        while done < part.elements:
            place = work.place(done)
            # A border that cuts through the first element makes it a block: the part before it has measured it.
            is_cut = done == 0 and part.skip > 0
            sizes = [1] if is_cut else self._sizes(start + place, item, part.elements - done)
            measured = work.several(done, sizes) or [work.one(done, sizes[0])]
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


class _Work(NamedTuple):
    """A part that is being computed; ``done`` elements of it are."""

    block: Block
    span: Span
    part: Part
    weights: list[Weights]
    arena: Arena
    outs: Bytes

    @property
    def item(self) -> int:
        return item_bytes(self.span.dtype)

    def place(self, done: int) -> int:
        """Where the next element begins in the rows of ``outs``; before the first one's bytes, perhaps."""
        return self.part.at - self.part.skip + done * self.item

    def several(self, done: int, sizes: Sequence[int]) -> list[list[Measures]]:
        """Compute the next blocks, as many of them as can be without waiting for an operand, decoding, or an element at
        an odd address: none, perhaps. Returns their measures."""
        place = self.place(done)
        if not self.block.copies or place < self.part.at or place % self.item:
            return []
        inside = (self.part.at + self.part.nbytes - place) // self.item
        sizes = [size for size, end in zip(sizes, accumulate(sizes), strict=True) if end <= inside]
        largest = [nbytes for _, nbytes in self._wanted(done, max(sizes, default=0))]
        found = self.arena.at_hand(self._wanted(done, sum(sizes)), largest) if sizes else None
        if found is None:
            return []
        measured = self._compute(found, self.outs, place, done, sizes)
        made = self._wanted(done, sum(sizes[: len(measured)]))
        copied = {(of, nbytes) for of, (_, nbytes) in zip(found, made, strict=True) if of.fd >= 0}
        self.arena.bytes_read += sum(nbytes for _, nbytes in copied)
        return measured

    def one(self, done: int, count: int) -> list[Measures]:
        """Compute the next block, of ``count`` elements. Returns its measures."""
        wanted = self._wanted(done, count)
        for at, nbytes in wanted:
            if at >= 0:
                self.arena.need(at, nbytes)
        found = [Found(at) for at, _ in wanted]
        part, place = self.part, self.place(done)
        low, high = max(place, part.at), min(place + count * self.item, part.at + part.nbytes)
        if high - low == count * self.item and place % self.item == 0:
            return self._compute(found, self.outs, place, done, [count])[0]
        # Elements at odd addresses, or some of their bytes are another part's.
        whole = np.empty((len(self.outs), count * self.item), np.uint8)
        (measured,) = self._compute(found, whole, 0, done, [count])
        self.outs[:, low:high] = whole[:, low - place : high - place]
        return measured

    def _compute(
        self, found: Sequence[Found], outs: Bytes, at: int, done: int, sizes: Sequence[int]
    ) -> list[list[Measures]]:
        return self.block(self.span, found, self.weights, self.arena.array, outs, at, self.part.first + done, sizes)

    def _wanted(self, done: int, count: int) -> list[tuple[int, int]]:
        """Of the operands' next ``count`` elements the place, which is negative of none, and the bytes."""
        places = [self.part.target, *(place for places in self.part.vectors for place in places)]
        items = [item_bytes(source.dtype) if source is not None else 0 for source in self.span.operands]
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
    if device == "cpu":
        from rv_distributed.runtime.compiled_block import CompiledBlock

        return CompiledBlock(config)
    from rv_distributed.runtime.torch_block import TorchBlock

    return TorchBlock(config, device, block_bytes)
