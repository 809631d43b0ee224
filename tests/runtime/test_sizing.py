"""Buffers: as large as they help, never above the budget, and refused when even the smallest do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import described

from rv_distributed.errors import UsageError
from rv_distributed.kernels.compiled import CompiledCombiner
from rv_distributed.plan import WHOLE_SHARDS, Plan, PlanOptions, make_plan
from rv_distributed.recipe import Arithmetic, Recipe, Vector
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerShape
from rv_distributed.runtime.select import RunOptions
from rv_distributed.runtime.sizing import (
    _SCRATCH_BYTES,
    CHUNK_BYTES,
    DEFAULT_BUDGET_BYTES,
    GPU_CHUNK_BYTES,
    REMOTE_CHUNK_BYTES,
    bytes_to_read,
    size_buffers,
    size_worker,
)
from rv_distributed.storage.objects import WRITER_BYTES

MIB = 1 << 20


def plan_of(
    elements: int,
    *,
    donor: str = "BF16",
    reference: str = "BF16",
    outputs: int = 1,
    options: PlanOptions | None = None,
    target: str = "/t",
) -> Plan:
    opened = {
        "t": described(target, {"x": ("BF16", (elements,)), "ids": ("I64", (2,))}),
        "a": described("/a", {"x": (donor, (elements,))}),
        "b": described("/b", {"x": (reference, (elements,))}),
    }
    alphas = tuple((float(number),) for number in range(1, outputs + 1))
    return make_plan(Recipe("transfer", "t", (Vector("a", "b"),), alphas), opened, options or PlanOptions())


def least_bytes(plan: Plan) -> int:
    """What one stream with the smallest chunks takes, found from outside."""
    low, high = 0, 1 << 40
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            size_buffers(plan, streams=1, budget_bytes=middle)
            high = middle
        except UsageError:
            low = middle
    return high


@given(
    st.integers(0, 10**10),
    st.integers(1, 64),
    st.integers(0, 2**33),
    st.integers(1, 5),
    st.sampled_from(["BF16", "F32"]),
)
def test_buffers_stay_within_the_budget_and_on_block_borders(
    elements: int, streams: int, budget: int, outputs: int, dtype: str
) -> None:
    plan = plan_of(elements, donor=dtype, reference=dtype, outputs=outputs)
    try:
        sizing = size_buffers(plan, streams=streams, budget_bytes=budget)
    except UsageError:
        # Three operands and the outputs, of a chunk of one block each, and the kernels' scratch space.
        assert budget < BLOCK_BYTES * (1 + 4 + outputs) + 2 * (4 + outputs) * BLOCK_BYTES
        return
    assert 1 <= sizing.streams <= streams
    assert sizing.buffer_bytes <= budget
    assert sizing.chunk_bytes % BLOCK_BYTES == 0
    assert BLOCK_BYTES <= sizing.chunk_bytes <= CHUNK_BYTES
    assert sizing.buffer_bytes >= sizing.streams * sizing.chunk_bytes * (3 + outputs)


def test_the_default_budget_gives_full_chunks_to_eight_streams() -> None:
    sizing = size_buffers(plan_of(10**9), streams=8, budget_bytes=DEFAULT_BUDGET_BYTES)
    assert (sizing.streams, sizing.chunk_bytes) == (8, CHUNK_BYTES)


def test_the_buffers_do_not_grow_with_the_model() -> None:
    small, large = (size_buffers(plan_of(n), streams=4, budget_bytes=DEFAULT_BUDGET_BYTES) for n in (10**8, 10**12))
    assert small == large


def test_a_small_model_gets_small_chunks() -> None:
    sizing = size_buffers(plan_of(10), streams=4, budget_bytes=DEFAULT_BUDGET_BYTES)
    assert sizing.chunk_bytes == BLOCK_BYTES


def test_chunks_shrink_before_streams_are_given_up() -> None:
    plan = plan_of(10**9)
    least = least_bytes(plan)
    full = size_buffers(plan, streams=1, budget_bytes=1 << 40)
    squeezed = size_buffers(plan, streams=3, budget_bytes=full.buffer_bytes)
    assert squeezed.streams == 3 or squeezed.chunk_bytes == BLOCK_BYTES
    assert squeezed.chunk_bytes < full.chunk_bytes
    assert size_buffers(plan, streams=8, budget_bytes=2 * least)[:2] == (2, BLOCK_BYTES)
    assert size_buffers(plan, streams=8, budget_bytes=8 * least)[:2] == (8, BLOCK_BYTES)


def test_a_budget_too_small_is_refused_with_what_would_do() -> None:
    plan = plan_of(10**9)
    least = least_bytes(plan)
    with pytest.raises(UsageError, match=f"at least {least} bytes.*not {least - 1}"):
        size_buffers(plan, streams=4, budget_bytes=least - 1)
    assert size_buffers(plan, streams=4, budget_bytes=least).streams == 1


@pytest.mark.parametrize("outputs", [1, 2, 8])
def test_the_scratch_of_float64_fits_into_what_counts_as_such(outputs: int) -> None:
    wide = Arithmetic("float64", "stochastic", 0)
    combiner = CompiledCombiner(outputs=outputs, weighted=True, stats="full", arithmetic=wide)
    arrays = [value for value in vars(combiner).values() if isinstance(value, np.ndarray)]
    assert len(arrays) == 3
    assert sum(array.nbytes for array in arrays) <= _SCRATCH_BYTES * (1 + outputs)


WHOLE = PlanOptions(piece_bytes=WHOLE_SHARDS, max_shard_bytes=4 * 10**8)


def test_sources_over_a_network_get_large_chunks_and_the_next_one_is_fetched_meanwhile() -> None:
    plan = plan_of(10**9, options=WHOLE, target="s3://bucket/t")
    plenty = size_buffers(plan, streams=16, budget_bytes=1 << 40)
    assert (plenty.streams, plenty.chunk_bytes, plenty.arenas) == (2, REMOTE_CHUNK_BYTES, 2)
    assert plenty.buffer_bytes >= 2 * REMOTE_CHUNK_BYTES * (2 * 3 + 1)


@pytest.mark.parametrize("remote_outputs", [0, 2])
@pytest.mark.parametrize("target", ["/t", "s3://bucket/t"])
@pytest.mark.parametrize("budget", [64 * MIB, 256 * MIB, 512 * MIB, 4096 * MIB])
def test_buffers_for_stores_stay_within_the_budget(target: str, remote_outputs: int, budget: int) -> None:
    """With the parts of shards that are on their way into stores."""
    plan = plan_of(10**10, outputs=2, options=WHOLE, target=target)
    try:
        sizing = size_buffers(plan, streams=16, budget_bytes=budget, remote_outputs=remote_outputs)
    except UsageError:
        assert budget == 64 * MIB
        assert remote_outputs
        return
    assert sizing.buffer_bytes <= budget
    arenas = 2 if target.startswith("s3") else 1
    assert sizing.arenas == arenas
    held = sizing.chunk_bytes * (3 * arenas + 2) + WRITER_BYTES * remote_outputs
    assert sizing.buffer_bytes >= sizing.streams * held


@pytest.mark.parametrize(
    ("donor", "reference", "out", "read_per_element"),
    [("BF16", "BF16", "auto", 6), ("F32", "F32", "auto", 10), ("F32", "BF16", "float32", 8)],
)
def test_bytes_to_read_counts_every_operand_once(donor: str, reference: str, out: str, read_per_element: int) -> None:
    plan = plan_of(1000, donor=donor, reference=reference, options=PlanOptions(dtype=out))
    assert bytes_to_read(plan) == 1000 * read_per_element + 16


def test_bytes_to_read_counts_what_is_target_and_reference_at_once_once() -> None:
    opened = {name: described(f"/{name}", {"x": ("BF16", (1000,))}) for name in ("t", "a")}
    plan = make_plan(Recipe("transfer", "t", (Vector("a", "t"),), ((1.0,),)), opened, PlanOptions())
    assert bytes_to_read(plan) == 4000


@pytest.mark.parametrize(
    ("cpus", "has_gpu", "budget", "streams", "chunk_bytes"),
    [
        (1, False, None, 3, CHUNK_BYTES),
        (16, False, None, 24, CHUNK_BYTES),
        (4, True, None, 6, GPU_CHUNK_BYTES),
        (16, True, 1 << 30, 6, GPU_CHUNK_BYTES),
        (4, True, 256 << 20, 6, GPU_CHUNK_BYTES // 2),
        (1, True, None, 3, GPU_CHUNK_BYTES),
    ],
)
def test_a_worker_has_streams_for_its_processors_and_large_chunks_for_a_gpu(
    cpus: int, has_gpu: bool, budget: int | None, streams: int, chunk_bytes: int
) -> None:
    options, shape = RunOptions(memory_budget_bytes=budget), WorkerShape(cpus, has_gpu)
    sizing = size_worker(plan_of(10**9), options, "ray", shape, remote_outputs=0)
    assert (sizing.streams, sizing.chunk_bytes) == (streams, chunk_bytes)
    assert sizing.buffer_bytes <= (budget or DEFAULT_BUDGET_BYTES)


def test_locally_workers_says_how_many_streams_there_are() -> None:
    shape = WorkerShape(16, has_gpu=False)
    assert size_worker(plan_of(10**9), RunOptions(workers=5), "local", shape, remote_outputs=0).streams == 5
    assert size_worker(plan_of(10**9), RunOptions(workers=5), "ray", shape, remote_outputs=0).streams == 24
