"""How many streams and how large their chunks: a pure function of the plan and a memory budget."""

from __future__ import annotations

from typing import Final, NamedTuple

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import UsageError
from rv_distributed.plan import Operand, Plan, TensorPlan
from rv_distributed.runtime.model import BLOCK_BYTES
from rv_distributed.storage.objects import WRITER_BYTES

#: Large enough for full storage speed, small enough that many streams fit a small budget.
CHUNK_BYTES = 4 << 20
#: The same where sources come over a network: a request costs more there, and a stream has fewer of them under way.
REMOTE_CHUNK_BYTES = 16 << 20
_LEAST_REMOTE_CHUNK_BYTES: Final = 8 << 20
#: Chunks whose sources a stream then has in memory: the one that it computes, and the next.
_REMOTE_ARENAS: Final = 2
DEFAULT_BUDGET_BYTES = 512 << 20
#: Scratch of a stream whose arithmetic is compiled, beside what each output takes.
_SCRATCH_BYTES: Final = 128 << 10
#: Of a stream that computes in float64, through torch: temporaries of rounding and measuring, mostly of 8 bytes.
_TEMPORARY_BYTES: Final = 10 * BLOCK_BYTES


class Sizing(NamedTuple):
    """The buffers of one worker."""

    streams: int
    chunk_bytes: int
    arenas: int
    """See `WorkerConfig`."""
    buffer_bytes: int
    """What all streams' buffers take together."""


def size_buffers(plan: Plan, *, streams: int, budget_bytes: int, remote_outputs: int = 0) -> Sizing:
    """As many streams as asked for and as large chunks as fit ``budget_bytes``; fewer streams if they must.

    ``remote_outputs`` counts the outputs that go into object stores. Raises UsageError when not even one stream with
    the smallest chunks fits.
    """
    outputs = len(plan.alphas)
    ratio = max((_operand_ratio(tensor) for tensor in plan.tensors), default=1.0)
    scratch = _SCRATCH_BYTES * (1 + outputs)
    if plan.arithmetic.compute_dtype == "float64":
        # As many elements as a block of a 16-bit dtype has.
        scratch += (4 + 2 * outputs) * 8 * (BLOCK_BYTES // 2) + _TEMPORARY_BYTES

    scratch += WRITER_BYTES * remote_outputs
    remote = _reads_remote(plan)
    arenas = _REMOTE_ARENAS if remote else 1
    if remote or remote_outputs:
        streams = min(streams, len(plan.pieces))

    def stream_bytes(chunk: int) -> int:
        return int(chunk * (ratio * arenas + outputs)) + scratch

    largest, least = (REMOTE_CHUNK_BYTES, _LEAST_REMOTE_CHUNK_BYTES) if remote else (CHUNK_BYTES, BLOCK_BYTES)
    chunk = min(largest, max(BLOCK_BYTES, -(-max(shard.size for shard in plan.shards) // BLOCK_BYTES) * BLOCK_BYTES))
    while chunk > least and streams * stream_bytes(chunk) > budget_bytes:
        chunk = max(least, chunk // 2 // BLOCK_BYTES * BLOCK_BYTES)
    # Large requests are worth more than many streams, but not the last stream.
    while chunk > BLOCK_BYTES and stream_bytes(chunk) > budget_bytes:
        chunk = max(BLOCK_BYTES, chunk // 2 // BLOCK_BYTES * BLOCK_BYTES)
    streams = min(streams, budget_bytes // stream_bytes(chunk))
    if streams < 1:
        raise UsageError(
            f"--memory-budget: this run needs at least {stream_bytes(chunk)} bytes a worker, not {budget_bytes}"
        )
    return Sizing(streams, chunk, arenas, streams * stream_bytes(chunk))


def _reads_remote(plan: Plan) -> bool:
    return any(is_remote(operand.path) for tensor in plan.tensors for operand in _operands(tensor))


def _operands(tensor: TensorPlan) -> list[Operand]:
    operands = [tensor.target] if tensor.target is not None else []
    for vector in tensor.vectors:
        operands += [vector.plus] if vector.minus is None else [vector.plus, vector.minus]
    return operands


def _operand_ratio(tensor: TensorPlan) -> float:
    """Bytes read for each byte written."""
    if tensor.rule == "copy":
        return 1.0
    return sum(item_bytes(operand.dtype) for operand in _operands(tensor)) / item_bytes(tensor.dtype)


def bytes_to_read(plan: Plan) -> int:
    """Bytes of tensor data that a run of the whole plan reads."""
    return sum(round((tensor.stop - tensor.start) * _operand_ratio(tensor)) for tensor in plan.tensors)
