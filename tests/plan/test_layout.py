"""Shards and pieces: every byte of the output is made exactly once, whatever the sizes."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ITEM_BYTES, described

from rv_distributed.checkpoint.header import HeaderError, tensor_bytes
from rv_distributed.plan import PIECE_ALIGNMENT, Plan, PlanOptions, cut_pieces, make_plan, size_pieces, task_of
from rv_distributed.plan.layout import group_into_shards, lay_out
from rv_distributed.recipe import Recipe, Vector

MIB = 1 << 20
FLOATS = ("F32", "BF16", "F16")

Shapes = dict[str, tuple[str, tuple[int, ...]]]

# Scalars, nothing at all, and from single bytes to several pieces: sizes only, nothing is allocated.
shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    st.integers(1, 3 * MIB).map(lambda size: (size,)),
    st.tuples(st.integers(1, 3), st.integers(250_000, 1_100_000)),
)
models = st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), shapes), max_size=12).map(
    lambda found: {f"layer.{number}.weight": entry for number, entry in enumerate(found)}
)


def plan_of(tensors: Shapes, *, max_shard_bytes: int, piece_bytes: int) -> Plan:
    """A plan that combines every tensor it can and copies the others."""
    tensors = {**tensors, "anchor": ("BF16", (3,))}
    model = described("/target", tensors)
    donor = described("/donor", {name: entry for name, entry in tensors.items() if entry[0] in FLOATS})
    recipe = Recipe("apply", "t", (Vector("v"),), ((0.7,),))
    options = PlanOptions(max_shard_bytes=max_shard_bytes, piece_bytes=piece_bytes)
    return make_plan(recipe, {"t": model, "v": donor}, options)


@given(st.lists(st.integers(0, 100)), st.integers(1, 120))
def test_shards_take_tensors_in_order_up_to_the_limit(sizes: list[int], limit: int) -> None:
    counts = group_into_shards(sizes, limit)
    assert sum(counts) == len(sizes)
    first = 0
    for number, count in enumerate(counts):
        shard = sizes[first : first + count]
        assert sum(shard) <= limit or count == 1
        first += count
        if number < len(counts) - 1:
            assert count > 0
            assert sum(shard) + sizes[first] > limit, "the next tensor had room in this shard"


@pytest.mark.parametrize(
    ("sizes", "limit", "counts"),
    [
        pytest.param([], 10, [0], id="nothing at all is one empty shard"),
        pytest.param([10, 10], 10, [1, 1], id="the limit itself fits"),
        pytest.param([5, 5, 1], 10, [2, 1], id="full to the byte"),
        pytest.param([25, 1, 1], 10, [1, 2], id="larger than the limit stands alone"),
        pytest.param([1, 25, 1], 10, [1, 1, 1], id="larger than the limit, between others"),
        pytest.param([10, 0, 0, 1], 10, [3, 1], id="empty tensors fill nothing"),
        pytest.param([0, 0], 1, [2], id="only empty tensors"),
    ],
)
def test_shards_of_known_sizes(sizes: list[int], limit: int, counts: list[int]) -> None:
    assert group_into_shards(sizes, limit) == counts


@given(st.lists(st.integers(0, 9 * MIB), max_size=5), st.integers(1, 4).map(lambda n: n * MIB))
def test_pieces_tile_every_file_with_aligned_borders(sizes: list[int], piece_bytes: int) -> None:
    pieces = cut_pieces(sizes, piece_bytes)
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    for shard, size in enumerate(sizes):
        end = 0
        for piece in (piece for piece in pieces if piece.shard == shard):
            assert piece.start == end
            assert 0 < piece.stop - piece.start <= piece_bytes
            assert piece.stop == size or piece.stop % PIECE_ALIGNMENT == 0
            end = piece.stop
        assert end == size


@pytest.mark.parametrize(
    ("nbytes", "piece_bytes"),
    [
        (0, 8 * MIB),
        (10**9, 8 * MIB),
        (3 * 10**9, 16 * MIB),
        (8 << 30, 64 * MIB),
        ((8 << 30) - 1, 32 * MIB),
        (10**12, 64 * MIB),
    ],
)
def test_pieces_are_small_where_there_would_be_few_of_them(nbytes: int, piece_bytes: int) -> None:
    assert PIECE_ALIGNMENT == MIB
    assert size_pieces(nbytes) == piece_bytes
    pieces = cut_pieces([nbytes // 2, nbytes - nbytes // 2])
    assert max((piece.stop - piece.start for piece in pieces), default=0) <= piece_bytes
    assert nbytes <= 10**9 or len(pieces) >= 128


def assert_covered_once(plan: Plan) -> None:
    """Literal and spans of all pieces tile all files, and say which bytes of which tensor they are."""
    for number, shard in enumerate(plan.shards):
        end, header = 0, b""
        for piece in (piece for piece in plan.pieces if piece.shard == number):
            assert piece.start == end
            task = task_of(plan, piece)
            assert task.shard_name == shard.name
            header += task.literal
            end += len(task.literal)
            for span in task.spans:
                tensor = plan.tensors[span.tensor]
                assert span.at == end == tensor.start + span.start
                assert 0 <= span.start < span.stop <= tensor.stop - tensor.start
                assert (span.name, span.dtype, span.rule) == (tensor.name, tensor.dtype, tensor.rule)
                segment = next(segment for segment in tensor.segments if span.start < segment.stop)
                assert span.stop <= segment.stop
                assert (span.target, span.vectors) == (segment.target, segment.vectors)
                assert tensor.shard == number
                end += span.stop - span.start
            assert end == piece.stop
        assert end == shard.size
        assert header == shard.header


def assert_headers_say_where_tensors_lie(plan: Plan, max_shard_bytes: int) -> None:
    for number, shard in enumerate(plan.shards):
        (length,) = struct.unpack("<Q", shard.header[:8])
        assert 8 + length == len(shard.header)
        document = json.loads(shard.header[8:])
        assert document.pop("__metadata__") == {"format": "pt"}
        tensors = plan.tensors[shard.first : shard.first + shard.length]
        assert list(document) == [tensor.name for tensor in tensors]
        for tensor in tensors:
            start, stop = (len(shard.header) + offset for offset in document[tensor.name]["data_offsets"])
            assert (start, stop, number) == (tensor.start, tensor.stop, tensor.shard)
            assert document[tensor.name]["dtype"] == tensor.dtype
            assert tuple(document[tensor.name]["shape"]) == tensor.shape
        assert shard.size - len(shard.header) <= max_shard_bytes or shard.length == 1


@settings(deadline=None)
@given(models, st.integers(1, 4 * MIB), st.sampled_from([MIB, 2 * MIB, 4 * MIB]))
def test_every_output_byte_lies_in_exactly_one_piece(tensors: Shapes, limit: int, piece_bytes: int) -> None:
    plan = plan_of(tensors, max_shard_bytes=limit, piece_bytes=piece_bytes)
    assert [tensor.name for tensor in plan.tensors] == [*tensors, "anchor"]
    assert_covered_once(plan)
    assert_headers_say_where_tensors_lie(plan, limit)
    assert plan.output_bytes == sum(piece.stop - piece.start for piece in plan.pieces)
    assert plan.data_bytes == plan.output_bytes - sum(len(shard.header) for shard in plan.shards)


def test_a_header_longer_than_a_piece_is_spread_over_pieces() -> None:
    tensors: Shapes = {f"{'x' * 200}.{number}": ("U8", (1,)) for number in range(6000)}
    plan = plan_of(tensors, max_shard_bytes=10 * MIB, piece_bytes=MIB)
    assert len(plan.shards[0].header) > MIB
    assert len(task_of(plan, plan.pieces[0]).literal) == MIB
    assert task_of(plan, plan.pieces[0]).spans == ()
    assert_covered_once(plan)


def test_a_tensor_larger_than_the_shard_limit_is_cut_into_pieces_of_one_shard() -> None:
    plan = plan_of({"a": ("F32", (2,)), "big": ("F32", (MIB,))}, max_shard_bytes=100, piece_bytes=MIB)
    assert [shard.length for shard in plan.shards] == [1, 1, 1]
    assert sum(piece.shard == 1 for piece in plan.pieces) == 5
    assert_covered_once(plan)


def test_a_file_beyond_32_bits_is_covered() -> None:
    plan = plan_of({"odd": ("U8", (3,)), "big": ("BF16", (5, 1 << 30))}, max_shard_bytes=1 << 40, piece_bytes=64 * MIB)
    assert plan.output_bytes > 10 << 30
    assert_covered_once(plan)


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, ["model.safetensors"]),
        (3, [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]),
        (12, [f"model-000{n:02d}-of-00012.safetensors" for n in range(1, 13)]),
    ],
)
def test_shards_have_the_names_that_transformers_gives(count: int, names: list[str]) -> None:
    shards = lay_out([(f"t{n}", "U8", (8,), 8) for n in range(count)], 8)
    assert [shard.name for shard in shards] == names


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F4", (3, 6), 9),
        ("F6_E2M3", (4,), 3),
        ("F6_E3M2", (2, 4), 6),
        ("F4", (0,), 0),
        ("F32", (), 4),
        ("C64", (2,), 16),
    ],
)
def test_packed_and_scalar_tensors_take_their_own_sizes(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert tensor_bytes(dtype, shape) == nbytes
    (shard,) = lay_out([("x", dtype, shape, nbytes)], 100)
    assert json.loads(shard.header[8:])["x"]["data_offsets"] == [0, nbytes]
    assert shard.size == len(shard.header) + nbytes


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (3,)), ("F6_E2M3", (5,)), ("F6_E3M2", ())])
def test_packed_elements_that_leave_a_byte_unfinished_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(HeaderError, match="not a whole number of bytes"):
        tensor_bytes(dtype, shape)


@settings(deadline=None, max_examples=25)
@given(models, st.integers(1, 4 * MIB))
def test_the_same_inputs_give_the_same_plan(tensors: Shapes, limit: int) -> None:
    one, other = (plan_of(tensors, max_shard_bytes=limit, piece_bytes=MIB) for _ in range(2))
    assert one == other
