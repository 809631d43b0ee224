"""Decoding: any range of a source's elements, in any blocks, from files, is the same part of the whole."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fp8_reference import dequantized, random_fp8
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import ITEM_BYTES, Raw, narrow, weights, widen

from rv_distributed.checkpoint.sources import (
    BlockScaled,
    Box,
    ByteRange,
    Decoded,
    Gathered,
    LowRank,
    Operand,
    Source,
    element_bytes,
    narrowed,
    path_of,
    ranges_of,
    shifted,
)
from rv_distributed.errors import PieceError
from rv_distributed.plan import Piece, PieceTask, Span
from rv_distributed.recipe import Weights
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.chunks import cut_chunks
from rv_distributed.runtime.decoding import Decoder, element_of

SHAPE = (3, 90, 70)
ROWS, COLUMNS, RANK = SHAPE[0] * SHAPE[1], SHAPE[2], 5


class File:
    """A file that tensors are put into, one after another, at odd places."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"odd")

    def put(self, raw: Raw) -> Operand:
        offset = self.path.stat().st_size
        with self.path.open("ab") as file:
            file.write(raw.data + b"!")
        return Operand(str(self.path), offset, raw.dtype)


def cut(whole: Raw, cuts: list[list[int]], file: File) -> Gathered:
    """A tensor in boxes, cut at the given places of each dimension."""
    values = np.frombuffer(whole.data, f"V{ITEM_BYTES[whole.dtype]}").reshape(whole.shape)
    grid = [list(zip([0, *at], [*at, size], strict=True)) for at, size in zip(cuts, whole.shape, strict=True)]
    boxes = []
    for cell in np.ndindex(*map(len, grid)):
        sides = [side[index] for side, index in zip(grid, cell, strict=True)]
        part = values[tuple(slice(*side) for side in sides)]
        operand = file.put(Raw(whole.dtype, part.shape, part.tobytes()))
        starts, sizes = tuple(low for low, _ in sides), tuple(high - low for low, high in sides)
        boxes.append(Box(operand.path, operand.offset, starts, sizes))
    return Gathered(whole.dtype, whole.shape, tuple(boxes))


def sources(folder: Path) -> Iterator[tuple[str, Source, Raw]]:
    """One of every kind, and what its elements are."""
    rng, file = np.random.default_rng(3), File(folder / "file")
    for scale_dtype in ("F32", "BF16", "F8_E8M0"):
        weight, scales = random_fp8(rng, SHAPE, scale_dtype, (32, 48))
        scaled = BlockScaled(file.put(weight), file.put(scales), SHAPE[1], SHAPE[2], (32, 48))
        yield f"fp8 with {scale_dtype}", scaled, dequantized(weight, scales, (32, 48))
    for dtype, cuts in (("BF16", [[1], [], []]), ("F32", [[], [10, 50], []]), ("F16", [[2], [45], [7, 64]])):
        whole = weights(rng, dtype, SHAPE)
        yield f"{dtype} cut at {cuts}", cut(whole, cuts, file), whole
    base = weights(rng, "BF16", (ROWS, COLUMNS))
    gathered = cut(base, [[100], [33]], file)
    bases: list[tuple[Any, Any]] = [(None, 0), (file.put(base), widen(base)), (gathered, widen(base))]
    bases.append((scaled, widen(dequantized(weight, scales, (32, 48)))))
    for number, (of, values) in enumerate(bases):
        for is_transposed in (False, True):
            left, right = weights(rng, "F32", (ROWS, RANK)), weights(rng, "BF16", (RANK, COLUMNS))
            total = np.zeros((ROWS, COLUMNS), np.float32)
            for k in range(RANK):
                total = total + widen(left).reshape(ROWS, RANK)[:, k : k + 1] * widen(right).reshape(RANK, COLUMNS)[k]
            wanted = np.float32(0.3) * total
            if of is not None:
                wanted = values.reshape(ROWS, COLUMNS) + wanted
            if is_transposed:
                left, right = transposed(left), transposed(right)
            scale = float(np.float32(0.3))
            adapted = LowRank(of, file.put(left), file.put(right), RANK, ROWS, COLUMNS, scale, is_transposed)
            yield f"adapter {number} {is_transposed}", adapted, Raw("F32", (ROWS, COLUMNS), wanted.tobytes())
    plain = weights(rng, "F16", SHAPE)
    yield "plain", file.put(plain), plain


def transposed(raw: Raw) -> Raw:
    values = widen(raw).reshape(raw.shape).T
    return Raw(raw.dtype, values.shape, narrow(np.ascontiguousarray(values).reshape(-1), raw.dtype))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Source, Raw]]:
    return list(sources(tmp_path_factory.mktemp("sources")))


def read(wanted: ByteRange) -> Any:
    with open(wanted.path, "rb") as file:
        file.seek(wanted.offset)
        raw = file.read(wanted.nbytes)
    assert len(raw) == wanted.nbytes
    return np.frombuffer(bytearray(raw), np.uint8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_range_of_any_source_is_that_part_of_the_whole(made: list[tuple[str, Source, Raw]], data: Any) -> None:
    _, source, whole = data.draw(st.sampled_from(made))
    count = math.prod(whole.shape)
    first = data.draw(st.integers(0, count - 1))
    elements = data.draw(st.one_of(st.integers(1, 200), st.just(count)).map(lambda n: min(n, count - first)))
    by = data.draw(st.integers(-50, first))
    # Counted from another element, and with no more than these elements need.
    source = narrowed(shifted(source, by), first - by, elements)
    item = ITEM_BYTES[source.dtype]
    wanted = whole.data[first * item : (first + elements) * item]
    assert element_bytes(source).held >= item
    if isinstance(source, Operand):
        assert read(source.range_of(first - by, elements)).tobytes() == wanted
        return
    into = np.zeros(elements * item, np.uint8)
    Decoder().decode(source, first - by, elements, read, into)
    assert into.tobytes() == wanted
    value = element_of(source, first - by)
    assert value == widen(Raw(source.dtype, (), wanted[:item]))[0]
    assert path_of(source, first - by).endswith("file")


def test_no_more_is_read_than_is_needed(made: list[tuple[str, Source, Raw]]) -> None:
    for name, source, whole in made:
        found = ranges_of(source, 1000, 300)
        nbytes = sum(wanted.nbytes for wanted in found)
        rows = 300 // COLUMNS + 2
        factors = 4 * RANK * rows if isinstance(source, LowRank) else 0
        scales = 4 * 2 * 2 if "fp8" in name or "adapter 3" in name else 0
        assert nbytes <= 300 * element_bytes(source).read + factors + scales, name
        if isinstance(source, Gathered):
            assert len(narrowed(source, 0, 5).boxes) == 1
            assert sum(len(narrowed(source, n, 1).boxes) for n in range(0, math.prod(whole.shape), 997)) == len(
                range(0, math.prod(whole.shape), 997)
            )


def test_an_arena_decodes_each_element_once_and_keeps_the_factors(
    made: list[tuple[str, Source, Raw]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[int, int]] = []
    plain = Decoder.decode

    def counting(self: Decoder, source: Decoded, first: int, count: int, fetch: Any, into: Any) -> None:
        decoded.append((first, count))
        plain(self, source, first, count, fetch, into)

    for name, source, whole in made:
        if isinstance(source, Operand):
            continue
        elements = math.prod(whole.shape)
        item = ITEM_BYTES[source.dtype]
        piece = Piece(0, 0, 0, elements * 4)
        span = Span(0, "w", "F32", 0, elements * 4, 0, "cast", source, (), (Weights(),))
        (chunk,) = cut_chunks(PieceTask(piece, "shard", b"", (span,)), 4 << 20)
        (part,) = chunk.parts
        (decoding,) = chunk.decodings
        assert part.target == decoding.at
        assert decoding.at >= max((read.at + read.nbytes for read in chunk.reads), default=0)
        assert decoding.at % 64 == 0
        assert chunk.arena_bytes == decoding.at + elements * item
        processor = threading.Semaphore(1)
        arena = Arena(4096, pinned=False, processor=processor, fetching=ThreadPoolExecutor(1))
        arena.load(chunk, ("w",))
        decoded.clear()
        with monkeypatch.context() as patch, processor:
            patch.setattr(Decoder, "decode", counting)
            for done in range(0, elements, 5000):
                count = min(5000, elements - done)
                arena.need(decoding.at + done * item, count * item)
                arena.need(decoding.at + done * item, item)
        assert arena.array[decoding.at : decoding.at + elements * item].tobytes() == whole.data, name
        outer = [found for found in decoded if found[1] == 5000 or sum(found) == elements]
        assert sum({found: found[1] for found in outer}.values()) == elements
        if isinstance(source, LowRank):
            factors = sum(factor.range_of(0, 1).nbytes for factor in source.factors())
            assert arena.bytes_read <= sum(r.nbytes for r in chunk.reads) + factors * RANK * max(ROWS, COLUMNS)
        arena.decoder.keep_only([None])


def test_a_factor_that_cannot_be_read_is_named(made: list[tuple[str, Source, Raw]], tmp_path: Path) -> None:
    source = next(source for _, source, _ in made if isinstance(source, LowRank))
    gone = source._replace(right=source.right._replace(path=str(tmp_path / "gone")))
    span = Span(0, "w", "F32", 0, 400, 0, "cast", gone, (), (Weights(),))
    (chunk,) = cut_chunks(PieceTask(Piece(0, 0, 0, 400), "shard", b"", (span,)), 4 << 20)
    processor = threading.Semaphore(1)
    arena = Arena(4096, pinned=False, processor=processor, fetching=ThreadPoolExecutor(1))
    arena.load(chunk, ("w",))
    with processor:
        with pytest.raises(PieceError, match=r"gone, bytes .* \(tensor 'w'\): cannot be read: No such file"):
            arena.need(chunk.decodings[0].at, 400)
        assert not processor.acquire(blocking=False)
