"""The worker: reads, computes and writes pieces. No ray in it; every runtime runs this one.

A worker holds a fixed number of streams. A stream takes one piece at a time and goes through it in chunks:
read the sources into its arena, compute and hash block by block into its output buffers, write those. There is no
queue between the steps: while one stream waits for the storage another computes, and memory is
``streams × (arena + output buffers)`` whatever the model's size. No more streams compute at once than the worker has
processors, and one: there is always one between two chunks, where it does little.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from itertools import cycle

import numpy as np
from blake3 import blake3

from rv_distributed.checkpoint.uris import join
from rv_distributed.errors import PieceError, UsageError
from rv_distributed.measures import Leaf, add_up
from rv_distributed.plan import PieceTask
from rv_distributed.runtime.arena import Arena
from rv_distributed.runtime.buffers import Buffer, Bytes
from rv_distributed.runtime.chunks import Chunk, cut_chunks
from rv_distributed.runtime.compute import PartComputer
from rv_distributed.runtime.model import MOST_REQUESTS, PieceResult, SpanResult, Waited, WorkerConfig
from rv_distributed.runtime.select import may_have_gpus
from rv_distributed.storage import ShardWriter, open_writer


class Stopped(Exception):
    """The worker was told to stop while it made a piece."""


class Worker:
    """Makes pieces. `run` may be called from ``config.streams`` threads at once; more of them wait."""

    def __init__(self, config: WorkerConfig) -> None:
        device = choose_device(config.device)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._stop = threading.Event()
        computing = threading.Semaphore(config.cpus + 1)
        # Starts threads only for reads over a network.
        fetching = ThreadPoolExecutor(MOST_REQUESTS, "rv-fetch")
        self._make_stream = partial(_Stream, config, device, self._stop, computing, fetching)
        # A stream is made by the thread that first needs it, and given again before another one is.
        self._streams: queue.LifoQueue[_Stream | None] = queue.LifoQueue()
        for _ in range(config.streams):
            self._streams.put(None)

    def run(self, task: PieceTask) -> PieceResult:
        """Make one piece and return once its bytes are on the device.

        Raises PieceError when its sources cannot be read or its place cannot be written; RunError when a GPU has too
        little memory; Stopped after `stop`.
        """
        stream = self._streams.get()
        try:
            stream = stream or self._make_stream()
            return stream.make(task, self.name)
        finally:
            self._streams.put(stream)

    def stop(self) -> None:
        """Make all calls of `run` raise Stopped at their next chunk, or PieceError rather than try a store again."""
        self._stop.set()


def choose_device(device: str) -> str:
    """The torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; UsageError when CUDA is asked for in vain."""
    # Only torch can tell whether it can use a GPU, but it need not be imported, for seconds, where there is none.
    if device == "cpu" or (device == "auto" and not may_have_gpus()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda" if device == "auto" else device
    if device != "auto":
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    return "cpu"


class _Stream:
    """The buffers and open files that one piece needs."""

    def __init__(
        self,
        config: WorkerConfig,
        device: str,
        stop: threading.Event,
        computing: threading.Semaphore,
        fetching: Executor,
    ) -> None:
        self._config = config
        self._stop = stop
        self._computing = computing
        self._arenas = [
            Arena(config.chunk_bytes, pinned=device != "cpu", processor=computing, fetching=fetching, stop=stop)
            for _ in range(config.arenas)
        ]
        # Kept, since memory is pinned as long as its buffer is there.
        self._buffer = Buffer(config.chunk_bytes * len(config.outputs), pinned=device != "cpu")
        self._outs = self._buffer.array.reshape(len(config.outputs), config.chunk_bytes)
        self._computer = PartComputer(config, device)

    def make(self, task: PieceTask, worker: str) -> PieceResult:
        tensors = [tensor for tensor, _ in task.parts]
        hashers = {tensor: [blake3() for _ in self._outs] for tensor in tensors}
        leaves: dict[int, list[list[Leaf]]] = {tensor: [[] for _ in self._outs] for tensor in tensors}
        scales: dict[int, list[bytes]] = {tensor: [b""] * len(self._outs) for tensor in tensors}
        compute_s = write_s = 0.0
        read_before, read_s_before = self._read()
        writers: list[ShardWriter] = []
        states: list[str] = []
        try:
            writers += [self._writer(task, folder) for folder in self._config.outputs]
            for chunk, arena in self._loaded(task):
                if self._stop.is_set():
                    raise Stopped
                began = time.perf_counter()
                with self._computing:
                    self._compute(task, chunk, arena, leaves, scales, hashers)
                # A read may have hung until the run was given up: another may have the place now.
                if self._stop.is_set():
                    raise Stopped
                writing = time.perf_counter()
                for writer, out in zip(writers, self._outs, strict=True):
                    states += self._write(task, writer, out, chunk)
                compute_s += writing - began
                write_s += time.perf_counter() - writing
        finally:
            for arena in self._arenas:
                arena.drop()
            for writer in writers:
                writer.close()
        outputs = tuple(
            tuple(
                SpanResult(
                    tensor,
                    hashers[tensor][number].hexdigest(),
                    add_up(leaves[tensor][number]),
                    b64encode(scales[tensor][number]).decode(),
                )
                for tensor in tensors
            )
            for number in range(len(self._outs))
        )
        bytes_written = (task.piece.stop - task.piece.start) * len(self._outs)
        bytes_read, read_s = self._read()
        bytes_read, read_s = bytes_read - read_before, read_s - read_s_before
        waited = Waited(read_s, compute_s - read_s, write_s)
        return PieceResult(task.piece.number, outputs, tuple(states), bytes_read, bytes_written, waited, worker)

    def _loaded(self, task: PieceTask) -> Iterator[tuple[Chunk, Arena]]:
        """The task's chunks, each with the arena that it is loaded into. With several arenas, those that follow are
        loaded already when one is given out."""
        loaded: deque[tuple[Chunk, Arena]] = deque()
        for chunk, arena in zip(cut_chunks(task, self._config.chunk_bytes), cycle(self._arenas), strict=False):
            arena.load(chunk, _names(task, chunk))
            loaded.append((chunk, arena))
            if len(loaded) == len(self._arenas):
                yield loaded.popleft()
        yield from loaded

    def _read(self) -> tuple[int, float]:
        """Bytes that were read so far, and the seconds that were waited for them."""
        return sum(arena.bytes_read for arena in self._arenas), sum(arena.read_s for arena in self._arenas)

    def _compute(
        self,
        task: PieceTask,
        chunk: Chunk,
        arena: Arena,
        leaves: Mapping[int, Sequence[list[Leaf]]],
        scales: Mapping[int, list[bytes]],
        hashers: Mapping[int, Sequence[blake3]],
    ) -> None:
        """Fill the output buffers; ``leaves``, ``scales`` and ``hashers``, by tensor and output, take it in."""
        self._outs[:, : len(chunk.literal)] = np.frombuffer(chunk.literal, np.uint8)
        for part in chunk.parts:
            span = task.spans[part.span]
            for made in self._computer.compute(span, part, arena, self._outs, chunk.start):
                for number, of_output in enumerate(made.leaves):
                    leaves[span.tensor][number] += of_output
                for number, raw in enumerate(made.scales.raw if made.scales else ()):
                    scales[span.tensor][number] += raw
                for out, hasher in zip(self._outs, hashers[span.tensor], strict=True):
                    hasher.update(out[made.start : made.stop].data)

    def _write(self, task: PieceTask, writer: ShardWriter, out: Bytes, chunk: Chunk) -> list[str]:
        """Write a chunk; after the last one, the state of what was written."""
        try:
            writer.write(out[: chunk.stop - chunk.start].data, chunk.start)
            return [writer.finish()] if chunk.stop == task.piece.stop else []
        except OSError as error:
            cause = f"cannot be written: {error.strerror or error}"
            raise PieceError(cause, writer.path, chunk.start, chunk.stop, _names(task, chunk)) from error

    def _writer(self, task: PieceTask, folder: str) -> ShardWriter:
        path = join(folder, task.shard_name)
        try:
            return open_writer(folder, task.shard_name, task.piece.stop - task.piece.start, self._stop)
        except OSError as error:
            cause = f"cannot be opened for writing: {error.strerror or error}"
            names = tuple(span.name for span in task.spans)
            raise PieceError(cause, path, task.piece.start, task.piece.stop, names) from error


def _names(task: PieceTask, chunk: Chunk) -> tuple[str, ...]:
    return tuple(task.spans[part.span].name for part in chunk.parts)
