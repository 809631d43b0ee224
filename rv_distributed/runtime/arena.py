"""The memory that a chunk's sources are read into, a block at a time where that is cheap.

What lies in the page cache is copied just before it is computed with, so that it is still in the processor's caches
then. What lies on this machine's storage is read for the whole chunk at once, as storage wants it. What comes over a
network is asked for as soon as the chunk is known, all of it at once, and then waited for. What has to be decoded is
decoded block by block, from what is read for it.

`Arena.load` says which chunk is to come; then `Arena.at_hand` or `Arena.need` is called before any of its bytes are
looked at.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from typing import Final, NamedTuple

from rv_distributed.checkpoint.dtypes import item_bytes
from rv_distributed.checkpoint.sources import ByteRange
from rv_distributed.errors import PieceError
from rv_distributed.runtime.buffers import Buffer, Bytes, read_range
from rv_distributed.runtime.chunks import Chunk, Decoding, Read
from rv_distributed.runtime.decoding import Decoder
from rv_distributed.storage import Reader, open_reader
from rv_distributed.storage.objects import REQUEST_BYTES

_OPEN_FILES: Final = 16
_CACHE_LINE: Final = 64


class Found(NamedTuple):
    """Where a range is."""

    at: int
    """In the arena; with a file, where each of its blocks is to be copied."""
    fd: int = -1
    """A file in whose page cache it may be, open until another is needed; -1 when it is in the arena."""
    offset: int = 0
    """Where it begins in that file."""


class Arena:
    """Source bytes of one chunk after another. Belongs to one thread at a time."""

    def __init__(
        self,
        nbytes: int,
        *,
        pinned: bool,
        processor: threading.Semaphore,
        fetching: Executor,
        stop: threading.Event | None = None,
    ) -> None:
        """``processor`` is held by whoever calls `need`, who lets go of it while the storage is waited for.
        ``fetching`` runs reads over a network; once ``stop`` is set, none of them is tried again."""
        self._buffer = Buffer(nbytes, pinned=pinned)
        self._processor = processor
        self._fetching = fetching
        self._stop = stop
        self._readers: OrderedDict[str, Reader] = OrderedDict()
        self._reads: tuple[Read, ...] = ()
        self._places: list[int] = []
        self._there: list[tuple[int, int]] = []
        """By read, from where to where its bytes are in their places, counted from its first."""
        self._fetches: dict[int, list[Future[None]]] = {}
        """By read, what has been asked for and not waited for yet."""
        self._decodings: tuple[Decoding, ...] = ()
        self._decoded: list[int] = []
        self._decoded_from = 0
        self._names: tuple[str, ...] = ()
        self.decoder = Decoder()
        self.bytes_read = 0
        """In all chunks so far."""
        self.read_s = 0.0
        """Seconds that it took, without waiting for a processor afterwards."""

    @property
    def array(self) -> Bytes:
        """The memory; another one after `load`."""
        return self._buffer.array

    def load(self, chunk: Chunk, names: tuple[str, ...]) -> None:
        """Make room for a chunk of the tensors ``names``; the one before it is forgotten.

        Raises PieceError when a source cannot be opened.
        """
        self.drop()
        self._buffer.grow(chunk.arena_bytes)
        self._reads, self._names = chunk.reads, names
        self._places = [read.at for read in chunk.reads]
        self._there = [(0, 0)] * len(chunk.reads)
        self._decodings = chunk.decodings
        self._decoded = [0] * len(chunk.decodings)
        self._decoded_from = chunk.decodings[0].at if chunk.decodings else chunk.arena_bytes
        for number, read in enumerate(chunk.reads):
            try:
                reader = self._reader(read.path)
            except OSError as error:
                raise self._failed(read, error) from error
            if reader.is_remote:
                self._fetches[number] = [
                    self._fetching.submit(reader.read, self._buffer.view, read.at + start, read.offset + start, count)
                    for start, count in _requests(read.nbytes)
                ]

    def at_hand(self, wanted: Sequence[tuple[int, int]], blocks: Sequence[int]) -> list[Found] | None:
        """Where some ranges of the chunk's reads are, each given by its place and its length; None when some of them
        have to be waited for, or decoded.

        What the page cache may hold stays there, for whoever copies it block by block to the same memory again and
        again, which the processor's caches hold: to where its read begins. The largest block of each range has
        ``blocks`` bytes. A place of -1 stays -1. Raises PieceError.
        """
        if len(wanted) > _OPEN_FILES or any(at >= self._decoded_from for at, _ in wanted):
            return None
        # Different ranges of one read would be copied to the same memory.
        numbers = [self._number(at) for at, _ in set(wanted) if at >= 0]
        found = [Found(at) for at, _ in wanted]
        for index, ((at, nbytes), block) in enumerate(zip(wanted, blocks, strict=True)):
            number = self._number(at)
            if at < 0 or self._is_there(number, at, nbytes):
                continue
            read = self._reads[number]
            to = -(-read.at // _CACHE_LINE) * _CACHE_LINE
            is_untouched = number not in self._fetches and self._there[number] == (0, 0)
            if not is_untouched or numbers.count(number) > 1 or to + block > read.at + read.nbytes:
                return None
            try:
                fd = self._reader(read.path).cache_fd
            except OSError as error:
                raise self._failed(read, error) from error
            if fd < 0:
                return None
            found[index] = Found(to, fd, read.offset + at - read.at)
        return found

    def _is_there(self, number: int, at: int, nbytes: int) -> bool:
        start, stop = self._there[number]
        first = at - self._reads[number].at
        return start <= first and first + nbytes <= stop

    def need(self, at: int, nbytes: int) -> None:
        """Return once ``nbytes`` bytes from ``at``, which lie in one of the chunk's reads or decodings, are there.

        Raises PieceError when they cannot be read.
        """
        if at >= self._decoded_from:
            self._decode(at, nbytes)
            return
        number = self._number(at)
        if self._is_there(number, at, nbytes):
            return
        read, (start, stop) = self._reads[number], self._there[number]
        first, last = at - read.at, at - read.at + nbytes
        began = time.perf_counter()
        try:
            if number in self._fetches:
                self._wait_for_fetches(number)
                start, done = 0, read.nbytes
            else:
                reader = self._reader(read.path)
                if start == stop:
                    start = stop = first
                if first < start:
                    # What is missing before what is there, and no more: each byte is read once.
                    self._wait_for(reader, read, first, start)
                    self.bytes_read += start - first
                    start = first
                done = stop
                if done < last:
                    done += reader.read_cached(self._buffer.view[read.at + stop : at + nbytes], read.offset + stop)
                if done < last:
                    self._wait_for(reader, read, done, read.nbytes)
                    done = read.nbytes
        except OSError as error:
            raise self._failed(read, error) from error
        self._there[number] = start, done
        self.bytes_read += done - stop
        self.read_s += time.perf_counter() - began

    def _number(self, at: int) -> int:
        """Of the read that a place belongs to."""
        return bisect_right(self._places, at) - 1

    def drop(self) -> None:
        """Give up what has been asked for; nothing writes to the memory any more."""
        fetches = [fetch for of_read in self._fetches.values() for fetch in of_read]
        wait([fetch for fetch in fetches if not fetch.cancel()])
        self._fetches = {}

    def _decode(self, at: int, nbytes: int) -> None:
        """Decode what is not decoded yet of the bytes up to ``at + nbytes``."""
        number = bisect_right(self._decodings, at, key=lambda decoding: decoding.at) - 1
        decoding, done = self._decodings[number], self._decoded[number]
        item = item_bytes(decoding.source.dtype)
        wanted = (at + nbytes - decoding.at) // item
        if wanted > done:
            into = self.array[decoding.at + done * item : decoding.at + wanted * item]
            self.decoder.decode(decoding.source, decoding.first + done, wanted - done, self._fetch, into)
            self._decoded[number] = wanted

    def _fetch(self, wanted: ByteRange) -> Bytes:
        """The bytes of a range: of one of the chunk's reads, or else read into memory of their own."""
        key = (wanted.path, wanted.offset)
        number = bisect_right(self._reads, key, key=lambda read: (read.path, read.offset)) - 1
        if number < 0:
            return self._read_apart(wanted)
        read = self._reads[number]
        inside = wanted.offset - read.offset
        if read.path != wanted.path or inside + wanted.nbytes > read.nbytes:
            return self._read_apart(wanted)
        self.need(read.at + inside, wanted.nbytes)
        return self.array[read.at + inside : read.at + inside + wanted.nbytes]

    def _read_apart(self, wanted: ByteRange) -> Bytes:
        began = time.perf_counter()
        try:
            with self._off_the_processor():
                found = read_range(self._reader(wanted.path), wanted)
        except OSError as error:
            raise self._failed(wanted, error) from error
        self.bytes_read += wanted.nbytes
        self.read_s += time.perf_counter() - began
        return found

    def _wait_for_fetches(self, number: int) -> None:
        with self._off_the_processor():
            for fetch in self._fetches[number]:
                fetch.result()

    def _wait_for(self, reader: Reader, read: Read, start: int, stop: int) -> None:
        """Read the bytes ``start`` to ``stop`` of a read."""
        with self._off_the_processor():
            reader.read(self._buffer.view, read.at + start, read.offset + start, stop - start)

    @contextmanager
    def _off_the_processor(self) -> Iterator[None]:
        self._processor.release()
        try:
            yield
        finally:
            asked = time.perf_counter()
            self._processor.acquire()
            self.read_s -= time.perf_counter() - asked

    def _reader(self, path: str) -> Reader:
        reader = self._readers.pop(path, None) or open_reader(path, self._stop)
        self._readers[path] = reader
        if len(self._readers) > _OPEN_FILES:
            self._readers.popitem(last=False)[1].close()
        return reader

    def _failed(self, read: Read | ByteRange, error: OSError) -> PieceError:
        cause = f"cannot be read: {error.strerror or error}"
        return PieceError(cause, read.path, read.offset, read.offset + read.nbytes, self._names)


def _requests(nbytes: int) -> list[tuple[int, int]]:
    """Where the parts of a read over a network begin, and how long they are."""
    return [(start, min(REQUEST_BYTES, nbytes - start)) for start in range(0, nbytes, REQUEST_BYTES)]
