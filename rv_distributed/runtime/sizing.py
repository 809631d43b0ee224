"""How many streams and how large their chunks: a pure function of the plan and a memory budget."""

from __future__ import annotations

from typing import Final, NamedTuple

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.errors import UsageError
from rv_distributed.plan import Plan, Segment, TensorPlan
from rv_distributed.plan.model import is_wide, operands_of
from rv_distributed.runtime.model import BLOCK_BYTES

#: Large enough for full storage speed, small enough that many streams fit a small budget.
CHUNK_BYTES = 4 << 20
DEFAULT_BUDGET_BYTES = 512 << 20
#: Scratch of a stream whose arithmetic is compiled, beside what each output takes.
_SCRATCH_BYTES: Final = 128 << 10
#: Of a stream that computes in float64, through torch: temporaries of rounding and measuring, mostly of 8 bytes.
_TEMPORARY_BYTES: Final = 10 * BLOCK_BYTES


class Sizing(NamedTuple):
    """The buffers of one worker."""

    streams: int
    chunk_bytes: int
    buffer_bytes: int
    """What all streams' buffers take together."""


def size_buffers(plan: Plan, *, streams: int, budget_bytes: int) -> Sizing:
    """As many streams as asked for and as large chunks as fit ``budget_bytes``; fewer streams if they must.

    Raises UsageError when not even one stream with the smallest chunks fits.
    """
    outputs = len(plan.alphas)
    ratio = max(
        (_operand_ratio(tensor, segment) for tensor in plan.tensors for segment in tensor.segments), default=1.0
    )
    scratch = _SCRATCH_BYTES * (1 + outputs)
    wide = (is_wide(tensor.dtype, each.target, each.vectors) for tensor in plan.tensors for each in tensor.segments)
    if plan.arithmetic.compute_dtype == "float64" or any(wide):
        # As many elements as a block of a 16-bit dtype has.
        scratch += (4 + 2 * outputs) * 8 * (BLOCK_BYTES // 2) + _TEMPORARY_BYTES

    def stream_bytes(chunk: int) -> int:
        return int(chunk * (ratio + outputs)) + scratch

    chunk = min(
        CHUNK_BYTES, max(BLOCK_BYTES, -(-max(shard.size for shard in plan.shards) // BLOCK_BYTES) * BLOCK_BYTES)
    )
    while chunk > BLOCK_BYTES and streams * stream_bytes(chunk) > budget_bytes:
        chunk = max(BLOCK_BYTES, chunk // 2 // BLOCK_BYTES * BLOCK_BYTES)
    streams = min(streams, budget_bytes // stream_bytes(chunk))
    if streams < 1:
        raise UsageError(
            f"--memory-budget: this run needs at least {stream_bytes(chunk)} bytes a worker, not {budget_bytes}"
        )
    return Sizing(streams, chunk, streams * stream_bytes(chunk))


def _operand_ratio(tensor: TensorPlan, segment: Segment) -> float:
    """Bytes read for each byte written."""
    if tensor.rule == "copy":
        return 1.0
    operands = operands_of(segment.target, segment.vectors)
    return sum(item_bytes(operand.dtype) for operand in operands) / item_bytes(tensor.dtype)


def bytes_to_read(plan: Plan) -> int:
    """Bytes of tensor data that a run of the whole plan reads."""
    total = 0
    for tensor in plan.tensors:
        start = 0
        for segment in tensor.segments:
            total += round((segment.stop - start) * _operand_ratio(tensor, segment))
            start = segment.stop
    return total
