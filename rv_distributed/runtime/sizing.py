"""How many streams and how large their chunks: a pure function of the plan and a memory budget."""

from __future__ import annotations

from typing import Final, NamedTuple

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.sources import LowRank, Operand, element_bytes, paths_of
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import UsageError
from rv_distributed.plan import Plan, Segment, TensorPlan
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerShape
from rv_distributed.runtime.select import ChosenRuntime, RunOptions
from rv_distributed.storage.objects import WRITER_BYTES

#: Large enough for full storage speed, small enough that many streams fit a small budget.
CHUNK_BYTES = 4 << 20
#: The same where sources come over a network: a request costs more there, and a stream has fewer of them under way.
REMOTE_CHUNK_BYTES = 16 << 20
#: The same for a GPU, which takes as long to be told what to do with a small one.
GPU_CHUNK_BYTES = 16 << 20
#: While some wait for the storage, there are enough others for the processors.
_STREAMS_OF_CPU: Final = 3
#: Of one process: its interpreter serves no more.
_MOST_STREAMS: Final = 24
#: Of one on a GPU: all of them can have chunks of its size then.
_MOST_STREAMS_ON_GPU: Final = 6
_LEAST_REMOTE_CHUNK_BYTES: Final = 8 << 20
#: Chunks whose sources a stream then has in memory: the one that it computes, and the next.
_REMOTE_ARENAS: Final = 2
DEFAULT_BUDGET_BYTES = 512 << 20
#: Scratch of a stream's arithmetic, beside as much for each output.
_SCRATCH_BYTES: Final = 128 << 10
#: Of a block that is decoded: its base in 16 bits and in 32, where an adapter has one, and the rows of a factor.
_DECODING_BYTES: Final = 4 * BLOCK_BYTES
#: Arrays of a band that is requantized, in the dtype of the arithmetic: t, d and two operands; for each output its sum
#: and a product, and of weighted sums that of the vectors. Beside them, for each output what it is in FP8 and is read
#: as; and random bits.
_BAND_ARRAYS: Final = 4
_BAND_ARRAYS_OF_OUTPUT: Final = 2
_BAND_BYTES_OF_OUTPUT: Final = 5
_BAND_RANDOM_BYTES: Final = 4


class Sizing(NamedTuple):
    """The buffers of one worker."""

    streams: int
    chunk_bytes: int
    arenas: int
    """See `WorkerConfig`."""
    buffer_bytes: int
    """What all streams' buffers take together."""


def default_streams(shape: WorkerShape) -> int:
    """How many streams a worker has where nobody says."""
    return min(_MOST_STREAMS_ON_GPU if shape.has_gpu else _MOST_STREAMS, _STREAMS_OF_CPU * shape.cpus)


def size_worker(
    plan: Plan, options: RunOptions, runtime: ChosenRuntime, shape: WorkerShape, *, remote_outputs: int
) -> Sizing:
    """The buffers of a worker of some shape; the rest as of `size_buffers`."""
    streams = default_streams(shape)
    if runtime == "local" and options.workers is not None:
        streams = options.workers
    return size_buffers(
        plan,
        streams=streams,
        budget_bytes=DEFAULT_BUDGET_BYTES if options.memory_budget_bytes is None else options.memory_budget_bytes,
        remote_outputs=remote_outputs,
        has_gpu=shape.has_gpu,
    )


def size_buffers(
    plan: Plan, *, streams: int, budget_bytes: int, remote_outputs: int = 0, has_gpu: bool = False
) -> Sizing:
    """As many streams as asked for and as large chunks as fit ``budget_bytes``; fewer streams if they must.

    ``remote_outputs`` counts the outputs that go into object stores. Raises UsageError when not even one stream with
    the smallest chunks fits.
    """
    outputs = len(plan.alphas)
    segments = [(tensor, segment) for tensor in plan.tensors for segment in tensor.segments]
    ratio = max((_arena_ratio(*of) for of in segments), default=1.0)
    scratch = _SCRATCH_BYTES * (1 + outputs)
    scratch += max((_decoding_bytes(segment) for _, segment in segments), default=0)
    scratch += max((_band_bytes(plan, *of) for of in segments), default=0)
    scratch += WRITER_BYTES * remote_outputs
    remote = any(is_remote(path) for _, segment in segments for source in segment.sources for path in paths_of(source))
    arenas = _REMOTE_ARENAS if remote else 1
    if remote or remote_outputs:
        streams = min(streams, len(plan.pieces))

    def stream_bytes(chunk: int) -> int:
        return int(chunk * (ratio * arenas + outputs)) + scratch

    largest = REMOTE_CHUNK_BYTES if remote else GPU_CHUNK_BYTES if has_gpu else CHUNK_BYTES
    least = _LEAST_REMOTE_CHUNK_BYTES if remote else BLOCK_BYTES
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


def _arena_ratio(tensor: TensorPlan, segment: Segment) -> float:
    """Bytes of the arena that it takes for each byte written."""
    if tensor.is_opaque_in(segment):
        return 1.0 if isinstance(segment.target, Operand) else 2.0
    return sum(element_bytes(source).held for source in segment.sources) / item_bytes(tensor.dtype)


def _decoding_bytes(segment: Segment) -> int:
    """What decoding takes beside the arena: factors, and temporaries of a block of 16-bit elements."""
    kept = sum(source.kept_bytes for source in segment.sources if isinstance(source, LowRank))
    return kept + (0 if all(isinstance(source, Operand) for source in segment.sources) else _DECODING_BYTES)


def _band_bytes(plan: Plan, tensor: TensorPlan, segment: Segment) -> int:
    """What a requantized tensor takes beside a chunk: the bands at its ends, as they are read, and a band's numbers."""
    if tensor.requantized is None:
        return 0
    outputs = len(plan.alphas)
    item = 8 if plan.arithmetic.compute_dtype == "float64" else 4
    arrays = _BAND_ARRAYS + (_BAND_ARRAYS_OF_OUTPUT + plan.weighted) * outputs
    numbers = item * arrays + _BAND_BYTES_OF_OUTPUT * outputs
    each = 2 * _arena_ratio(tensor, segment) + numbers + _BAND_RANDOM_BYTES
    return int(tensor.requantized.band_bytes * each)


def bytes_to_read(plan: Plan) -> int:
    """Bytes of tensor data that a run of the whole plan reads; without scales and factors, which are few."""
    total = 0
    for tensor in plan.tensors:
        start = 0
        for segment in tensor.segments:
            total += round((segment.stop - start) * _read_ratio(tensor, segment))
            start = segment.stop
    return total


def _read_ratio(tensor: TensorPlan, segment: Segment) -> float:
    """Bytes read for each byte written."""
    if tensor.is_opaque_in(segment):
        return 1.0
    # What is the target and the reference at once is read once.
    return sum(element_bytes(source).read for source in set(segment.sources)) / item_bytes(tensor.dtype)
