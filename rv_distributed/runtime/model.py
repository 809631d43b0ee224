"""What goes into a runtime and comes out of it. Small, frozen, and the same for every runtime."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rv_distributed.measures import Measures
from rv_distributed.plan import PieceTask
from rv_distributed.recipe import Arithmetic, Stats

#: Compute happens in blocks of this many output bytes, cut at multiples of it in the output file: small
#: enough for the processor's caches, and the same blocks whatever the chunks and pieces.
BLOCK_BYTES = 512 * 1024
#: Reads over a network that a worker has under way at once.
MOST_REQUESTS = 64
#: Storage slower than this hangs.
_SLOWEST_BYTES_PER_S = 1_000_000
_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """How a worker streams; the same for all workers of a run."""

    outputs: tuple[str, ...]
    """Folder of each output's shards, as `open_writer` takes it. Files exist in full size, objects do not."""
    numbers: tuple[int, ...]
    """Of these outputs in the plan, and so of their weights in a span."""
    weighted: bool
    """As `Plan.weighted`."""
    device: str
    """``cpu``, ``cuda``, ``cuda:N``, or ``auto``: the GPU that the worker sees, if any."""
    streams: int
    """Pieces in progress at once, each with its own buffers and thread."""
    cpus: int
    """Processors that a worker has. Many more streams than these computing would push each other out of the caches."""
    chunk_bytes: int
    """Output bytes that a stream reads, computes and writes at a time; a multiple of `BLOCK_BYTES`."""
    arenas: int
    """Chunks whose sources a stream has in memory at once: more than one where they come over a network."""
    buffer_bytes: int
    """What the buffers of all streams take together."""
    stats: Stats
    """What is measured. NaN and infinity are always counted."""
    arithmetic: Arithmetic


class SpanResult(NamedTuple):
    """What became of the part of one tensor that lay in a piece, in one output."""

    tensor: int
    """Index into ``Plan.tensors``."""
    digest: str
    """BLAKE3 of the part's bytes, in hexadecimal."""
    measures: Measures
    scales: str = ""
    """The scales of the bands that begin in it, in base64 and in order, where it is a requantized tensor's."""


class Waited(NamedTuple):
    """Where the time of a stream went, in seconds."""

    read_s: float
    compute_s: float
    """Arithmetic, measures and digests, with copies out of the page cache for them, and waiting for a processor."""
    write_s: float


class PieceResult(NamedTuple):
    """A finished piece: its bytes are on the device."""

    piece: int
    outputs: tuple[tuple[SpanResult, ...], ...]
    """One tuple an output, with its spans in file order."""
    states: tuple[str, ...]
    """One an output: the state of the object that the piece is; empty where the piece is a part of a file."""
    bytes_read: int
    bytes_written: int
    waited: Waited
    worker: str
    """Who did it: ``host:pid``."""
    attempt: int = 1
    """How many workers it took."""


def patience_s(task: PieceTask, outputs: int) -> float:
    """How long a piece may take before whoever makes it counts as hanging, in seconds."""
    read = sum((span.stop - span.start) * (1 + 2 * len(span.vectors)) for span in task.spans)
    written = (task.piece.stop - task.piece.start) * outputs
    return _PATIENCE_S + (read + written) / _SLOWEST_BYTES_PER_S


class WorkerShape(NamedTuple):
    """What a worker has."""

    cpus: int
    has_gpu: bool


class Runtime(Protocol):
    """Runs tasks on workers. The tasks come in file order; the results in any.

    Entered before a run takes its output's place: what is asked for and not there, such as a cluster or a GPU,
    is a UsageError then.
    """

    shape: WorkerShape
    """Of each worker; known once it is entered."""

    def __enter__(self) -> Runtime: ...

    def __exit__(self, *error: object) -> None: ...

    def run(
        self, tasks: Iterable[PieceTask], config: WorkerConfig, *, kept: int = 0
    ) -> Generator[PieceResult, None, None]:
        """Yield a result for every task. Closing the generator early stops the workers. ``kept`` more pieces are
        finished already: they count where the run tells how far it is.

        Raises PieceError at the first piece that cannot be made, WorkerError when workers are lost or hang.
        """
        ...
