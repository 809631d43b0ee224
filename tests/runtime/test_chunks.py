"""Chunks: each window of a piece is filled exactly, from reads whose places in the arena never meet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import ITEM_BYTES, described

from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.plan import Operand, PieceTask, Plan, PlanOptions, Source, Span, make_plan, task_of
from rv_distributed.recipe import Recipe, Vector
from rv_distributed.runtime.chunks import Chunk, Part, cut_chunks
from rv_distributed.storage.ranges import ALIGNMENT, DIRECT_MIN_BYTES

MIB = 1 << 20
SCRIBBLE = 0xEE

Entries = list[tuple[str, int, str, str]]

# A tensor of the target: its dtype, its elements, and the dtypes of donor and reference.
entries = st.lists(
    st.tuples(
        st.sampled_from(["U8", "BF16", "F32", "I64"]),
        st.one_of(st.integers(0, 40), st.sampled_from([65_536, 70_001, 131_072, 299_999])),
        st.sampled_from(["BF16", "F32", "F16"]),
        st.sampled_from(["BF16", "F32", "F16"]),
    ),
    min_size=1,
    max_size=8,
)
ODD: Entries = [("U8", 3, "BF16", "BF16"), ("F32", 299_999, "F32", "BF16"), ("BF16", 299_999, "F16", "F32")]
# What the format calls a file's first data byte; inputs of other tools start it anywhere.
first_bytes = st.tuples(*[st.integers(8, 5000)] * 3)


@cache
def content_of(path: str, nbytes: int) -> bytes:
    """The bytes of a file that does not exist; no two of its 16-byte lines are likely to be the same."""
    return hashlib.shake_128(path.encode()).digest(nbytes)


def plan_of(found: Entries, first: tuple[int, int, int], *, stored: bool = False, shared: bool = False) -> Plan:
    """A transfer (or an apply of a stored vector) over three files; with ``shared``, donor and target are one."""
    names = [f"t{number}" for number in range(len(found))]
    target = {name: (dtype, (count,)) for name, (dtype, count, _, _) in zip(names, found, strict=True)}
    donor = {name: (dtype, (count,)) for name, (_, count, dtype, _) in zip(names, found, strict=True)}
    reference = {name: (dtype, (count,)) for name, (_, count, _, dtype) in zip(names, found, strict=True)}
    opened = {
        "t": described("/t", {**target, "anchor": ("BF16", (5,))}, first_byte=first[0]),
        "a": described("/a", {"anchor": ("F32", (5,)), **donor}, first_byte=first[1]),
        "b": described("/b", {**reference, "anchor": ("BF16", (5,))}, first_byte=first[2]),
    }
    if shared:
        opened["a"] = opened["t"]
    recipe = Recipe("transfer", "t", (Vector("a", None if stored else "b"),), ((0.5,),))
    return make_plan(recipe, opened, PlanOptions(piece_bytes=MIB, max_shard_bytes=3 * MIB, dtype="auto"))


def chunks_of(plan: Plan, chunk_bytes: int) -> Iterator[tuple[PieceTask, Chunk]]:
    for piece in plan.pieces:
        task = task_of(plan, piece)
        for chunk in cut_chunks(task, chunk_bytes):
            yield task, chunk


def reach(read_at: int, nbytes: int, offset: int) -> tuple[int, int]:
    """The arena bytes that a read may touch: a direct one overwrites the aligned blocks around its own."""
    if nbytes < DIRECT_MIN_BYTES or (read_at - offset) % ALIGNMENT:
        return read_at, read_at + nbytes
    return read_at // ALIGNMENT * ALIGNMENT, -(-(read_at + nbytes) // ALIGNMENT) * ALIGNMENT


def execute(chunk: Chunk, sizes: dict[str, int]) -> bytearray:
    """The arena after all reads, each of which scribbles as far as it may."""
    arena = bytearray(chunk.arena_bytes)
    for read in chunk.reads:
        assert read.nbytes > 0
        assert 0 <= read.offset <= read.offset + read.nbytes <= sizes[read.path]
        low, high = reach(read.at, read.nbytes, read.offset)
        assert 0 <= low <= high <= chunk.arena_bytes
        arena[low:high] = bytes([SCRIBBLE]) * (high - low)
        content = content_of(read.path, sizes[read.path])
        arena[read.at : read.at + read.nbytes] = content[read.offset : read.offset + read.nbytes]
    return arena


def operands(span: Span, part: Part) -> Iterator[tuple[Source, int]]:
    """Each operand of a part with its place in the arena."""
    assert (span.target is None) == (part.target < 0)
    if span.target is not None:
        yield span.target, part.target
    assert len(span.vectors) == len(part.vectors)
    for vector, (plus_at, minus_at) in zip(span.vectors, part.vectors, strict=True):
        yield vector.plus, plus_at
        assert (vector.minus is None) == (minus_at < 0)
        if vector.minus is not None:
            yield vector.minus, minus_at


def sizes_of(plan: Plan) -> dict[str, int]:
    return {f"{item.uri}/{file.name}": file.size for item in plan.inputs for file in item.files}


chunk_sizes = st.sampled_from([ALIGNMENT, 3 * ALIGNMENT, MIB // 2, MIB, 4 * MIB])
cases = [entries, first_bytes, chunk_sizes, st.booleans(), st.booleans()]


@settings(deadline=None, max_examples=60)
@given(*cases)
@example(ODD, (8, 11, 4099), MIB // 2, False, False)
@example(ODD, (8, 8, 8), ALIGNMENT, True, True)
def test_literal_and_parts_tile_every_window(
    found: Entries, first: tuple[int, int, int], chunk_bytes: int, stored: bool, shared: bool
) -> None:
    plan = plan_of(found, first, stored=stored, shared=shared)
    end_of_piece: dict[int, int] = {}
    for task, chunk in chunks_of(plan, chunk_bytes):
        assert chunk.start == end_of_piece.get(task.piece.number, task.piece.start)
        assert 0 < chunk.stop - chunk.start <= chunk_bytes
        header = plan.shards[task.piece.shard].header
        assert chunk.literal == header[chunk.start : chunk.stop]
        at = len(chunk.literal)
        for part in chunk.parts:
            span = task.spans[part.span]
            assert part.at == at
            assert part.nbytes > 0
            first_byte = span.start + chunk.start + part.at - span.at
            assert 0 <= first_byte < first_byte + part.nbytes <= span.stop
            item = 1 if span.rule == "copy" else ITEM_BYTES[span.dtype]
            assert part.skip == first_byte % item
            assert part.elements == -(-(part.skip + part.nbytes) // item)
            at += part.nbytes
        assert chunk.start + at == chunk.stop
        end_of_piece[task.piece.number] = chunk.stop
    assert end_of_piece == {piece.number: piece.stop for piece in plan.pieces}


@settings(deadline=None, max_examples=60)
@given(*cases)
@example(ODD, (8, 11, 4099), MIB // 2, False, False)
@example(ODD, (4095, 4097, 9), MIB, False, True)
def test_arena_places_of_different_reads_never_meet(
    found: Entries, first: tuple[int, int, int], chunk_bytes: int, stored: bool, shared: bool
) -> None:
    for _, chunk in chunks_of(plan_of(found, first, stored=stored, shared=shared), chunk_bytes):
        places = sorted(reach(read.at, read.nbytes, read.offset) for read in chunk.reads)
        for (_, high), (low, _) in pairwise(places):
            assert high <= low
        for read in chunk.reads:
            if read.nbytes >= DIRECT_MIN_BYTES:
                assert read.at % ALIGNMENT == read.offset % ALIGNMENT, "this read cannot go direct"


@settings(deadline=None, max_examples=25)
@given(entries, first_bytes, st.sampled_from([5 * ALIGNMENT, MIB // 2, MIB]), st.booleans(), st.booleans())
@example(ODD, (8, 11, 4099), 5 * ALIGNMENT, False, False)
@example(ODD, (8, 11, 4099), MIB, False, False)
@example(ODD, (8, 12, 4096), MIB // 2, True, True)
def test_every_operand_has_its_elements_in_the_arena_after_the_reads(
    found: Entries, first: tuple[int, int, int], chunk_bytes: int, stored: bool, shared: bool
) -> None:
    plan = plan_of(found, first, stored=stored, shared=shared)
    sizes = sizes_of(plan)
    for task, chunk in chunks_of(plan, chunk_bytes):
        arena = execute(chunk, sizes)
        for part in chunk.parts:
            span = task.spans[part.span]
            item = 1 if span.rule == "copy" else ITEM_BYTES[span.dtype]
            element = (span.start + chunk.start + part.at - span.at) // item
            for operand, at in operands(span, part):
                assert isinstance(operand, Operand)
                width = 1 if span.rule == "copy" else ITEM_BYTES[operand.dtype]
                start = operand.offset + element * width
                wanted = content_of(operand.path, sizes[operand.path])[start : start + part.elements * width]
                assert arena[at : at + len(wanted)] == wanted


def one_tensor(dtype: str, count: int, other: str, *, odd: int) -> tuple[Plan, Checkpoint]:
    """A plan whose only combined tensor starts ``odd`` bytes into the data."""
    target = described("/t", {"odd": ("U8", (odd,)), "x": (dtype, (count,))})
    vector = described("/v", {"x": (other, (count,))})
    recipe = Recipe("apply", "t", (Vector("v"),), ((0.5,),))
    return make_plan(recipe, {"t": target, "v": vector}, PlanOptions(piece_bytes=MIB)), target


@pytest.mark.parametrize(("dtype", "odd"), [("F32", 1), ("F32", 2), ("F32", 3), ("BF16", 1), ("BF16", 4095)])
def test_an_element_across_a_border_belongs_to_the_chunks_on_both_sides(dtype: str, odd: int) -> None:
    plan, _ = one_tensor(dtype, 600_000, "F32", odd=odd)
    item = ITEM_BYTES[dtype]
    chunks = [chunk for _, chunk in chunks_of(plan, MIB // 2)]
    for chunk, after in pairwise(chunks):
        before, behind = chunk.parts[-1], after.parts[0]
        inside = (before.skip + before.nbytes) % item
        assert inside == behind.skip == -odd % item
        assert before.elements * item == before.skip + before.nbytes + (item - inside)
        assert behind.at == 0


def test_elements_are_read_once_where_sources_touch() -> None:
    plan = plan_of([("BF16", 1000, "BF16", "BF16"), ("BF16", 500, "BF16", "BF16")], (8, 8, 8))
    (chunk,) = (chunk for _, chunk in chunks_of(plan, MIB))
    assert sorted(read.path for read in chunk.reads) == [f"/{name}/model.safetensors" for name in "abt"]
    assert sum(read.nbytes for read in chunk.reads) == 2 * 1505 * 2 + 1500 * 2 + 5 * 4


def test_one_file_that_is_both_donor_and_target_is_read_once() -> None:
    plan = plan_of([("BF16", 300_000, "BF16", "BF16")], (8, 8, 8), shared=True)
    for _, chunk in chunks_of(plan, MIB):
        assert sorted(read.path for read in chunk.reads) == ["/b/model.safetensors", "/t/model.safetensors"]
        for part in chunk.parts:
            assert part.vectors[0][0] == part.target
