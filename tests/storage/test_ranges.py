"""Ranged reads and writes: the same bytes by every path, whatever the offsets."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from rv_distributed.storage import ranges
from rv_distributed.storage.ranges import ALIGNMENT, DIRECT_MIN_BYTES, RangeReader, RangeWriter

#: Neither a multiple of a page nor of a disk's sector.
FILE_BYTES = 3 * DIRECT_MIN_BYTES + 5 * ALIGNMENT + 777
CONTENT = np.random.default_rng(1).bytes(FILE_BYTES)


def drop_cache(path: Path) -> None:
    """What is on the device leaves the page cache, so that the next read has to fetch it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def page_aligned(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


@pytest.fixture(autouse=True, params=["direct", "buffered", "no cache query"])
def _path_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs every test with direct I/O, as a system without it, and as one that cannot ask the cache."""
    if request.param == "buffered":
        monkeypatch.setattr(ranges, "_O_DIRECT", 0)
    if request.param == "no cache query":
        monkeypatch.setattr(ranges, "_RWF_NOWAIT", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def reader(source: Path) -> Iterator[RangeReader]:
    with closing(RangeReader(str(source))) as opened:
        yield opened


READS = {
    "nothing": (0, 0, 0),
    "nothing at the end": (0, FILE_BYTES, 0),
    "one byte": (3, 5, 1),
    "the first byte": (0, 0, 1),
    "the last byte": (9, FILE_BYTES - 1, 1),
    "a page": (0, ALIGNMENT, ALIGNMENT),
    "over a page's border": (1, ALIGNMENT - 1, 2),
    "one byte below the direct size": (0, 0, DIRECT_MIN_BYTES - 1),
    "the direct size, aligned": (0, 0, DIRECT_MIN_BYTES),
    "aligned, at another place": (2 * ALIGNMENT, 3 * ALIGNMENT, DIRECT_MIN_BYTES),
    "both off by the same": (77, ALIGNMENT + 77, DIRECT_MIN_BYTES),
    "both off by the same, pages apart": (2 * ALIGNMENT + 4095, 4095, DIRECT_MIN_BYTES + 12345),
    "off by different amounts": (1, 2, 2 * DIRECT_MIN_BYTES),
    "only the offset is odd": (0, 13, DIRECT_MIN_BYTES + 1),
    "the whole file": (0, 0, FILE_BYTES),
    "aligned, to the unaligned end": (0, 2 * ALIGNMENT, FILE_BYTES - 2 * ALIGNMENT),
    "unaligned, to the unaligned end": (4001, 4001, FILE_BYTES - 4001),
    "odd, to the unaligned end": (5, 4001, FILE_BYTES - 4001),
}


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "dropped"])
@pytest.mark.parametrize(("at", "offset", "nbytes"), READS.values(), ids=READS)
def test_a_range_arrives_where_it_was_asked_for(
    reader: RangeReader, source: Path, at: int, offset: int, nbytes: int, cached: bool
) -> None:
    buffer = page_aligned(FILE_BYTES + 4 * ALIGNMENT)
    if cached:
        source.read_bytes()
    else:
        drop_cache(source)
    reader.read(buffer, at, offset, nbytes)
    assert buffer[at : at + nbytes] == CONTENT[offset : offset + nbytes]


@pytest.mark.parametrize("offset", [0, 77])
def test_a_read_touches_only_the_blocks_of_its_range(source: Path, offset: int) -> None:
    at, nbytes = 2 * ALIGNMENT + offset, DIRECT_MIN_BYTES
    buffer = page_aligned(DIRECT_MIN_BYTES + 8 * ALIGNMENT)
    buffer[:] = b"\xee" * len(buffer)
    drop_cache(source)
    with closing(RangeReader(str(source))) as reader:
        reader.read(buffer, at, offset, nbytes)
    first, last = at // ALIGNMENT * ALIGNMENT, -(-(at + nbytes) // ALIGNMENT) * ALIGNMENT
    assert buffer[:first] == b"\xee" * first
    assert buffer[last:] == b"\xee" * (len(buffer) - last)
    assert buffer[at : at + nbytes] == CONTENT[offset : offset + nbytes]


def test_a_half_cached_range_is_read_whole(reader: RangeReader, source: Path) -> None:
    """The cached front is copied, the rest read around the cache, from a block that both touch."""
    drop_cache(source)
    with open(source, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.read(3 * ALIGNMENT + 100)
    buffer = page_aligned(FILE_BYTES + ALIGNMENT)
    reader.read(buffer, 11, 11, FILE_BYTES - 11)
    assert buffer[11:FILE_BYTES] == CONTENT[11:]


def test_many_odd_ranges_of_one_reader_are_right(reader: RangeReader, source: Path) -> None:
    generator = np.random.default_rng(2)
    buffer = page_aligned(FILE_BYTES + 4 * ALIGNMENT)
    for _ in range(60):
        offset = int(generator.integers(FILE_BYTES))
        nbytes = int(generator.integers(FILE_BYTES - offset + 1))
        at = [offset % ALIGNMENT, offset % ALIGNMENT + ALIGNMENT, 1234][generator.integers(3)]
        if generator.integers(2):
            drop_cache(source)
        reader.read(buffer, at, offset, nbytes)
        assert buffer[at : at + nbytes] == CONTENT[offset : offset + nbytes]


TRUNCATED = {
    "small": (0, 0, 100, 50),
    "aligned, cut inside a page": (0, 0, 2 * DIRECT_MIN_BYTES, DIRECT_MIN_BYTES + 1001),
    "aligned, cut between pages": (0, ALIGNMENT, 2 * DIRECT_MIN_BYTES, DIRECT_MIN_BYTES),
    "odd, cut inside a page": (1, 0, 2 * DIRECT_MIN_BYTES, DIRECT_MIN_BYTES + 1001),
    "wholly behind the cut": (0, ALIGNMENT, DIRECT_MIN_BYTES, 7),
    "cut to nothing": (0, 0, DIRECT_MIN_BYTES, 0),
    "one byte short": (0, 0, FILE_BYTES, FILE_BYTES - 1),
}


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "dropped"])
@pytest.mark.parametrize(("at", "offset", "nbytes", "size"), TRUNCATED.values(), ids=TRUNCATED)
def test_a_file_cut_short_while_open_is_an_error_that_names_it(
    reader: RangeReader, source: Path, at: int, offset: int, nbytes: int, size: int, cached: bool
) -> None:
    os.truncate(source, size)
    if not cached:
        drop_cache(source)
    with pytest.raises(OSError, match="was longer when it was opened") as caught:
        reader.read(page_aligned(FILE_BYTES + 2 * ALIGNMENT), at, offset, nbytes)
    assert caught.value.filename == str(source)
    assert f"ends at byte {max(size, offset)};" in str(caught.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = str(tmp_path / "gone")
    for opener in (RangeReader, RangeWriter):
        with pytest.raises(FileNotFoundError) as caught:
            opener(path)
        assert caught.value.filename == path


WRITES = {
    "nothing": (0, 0),
    "the first byte": (0, 1),
    "the last byte": (FILE_BYTES - 1, 1),
    "a page": (ALIGNMENT, ALIGNMENT),
    "pages": (3 * ALIGNMENT, DIRECT_MIN_BYTES),
    "pages and a tail": (2 * ALIGNMENT, DIRECT_MIN_BYTES + 13),
    "a tail alone, aligned": (ALIGNMENT, 100),
    "unaligned start": (77, DIRECT_MIN_BYTES),
    "unaligned start, aligned end": (ALIGNMENT - 1, ALIGNMENT + 1),
    "to the unaligned end": (4 * ALIGNMENT, FILE_BYTES - 4 * ALIGNMENT),
    "the whole file": (0, FILE_BYTES),
}


@pytest.mark.parametrize(("offset", "nbytes"), WRITES.values(), ids=WRITES)
def test_a_write_changes_its_range_and_no_other_byte(source: Path, offset: int, nbytes: int) -> None:
    new = np.random.default_rng(3).bytes(nbytes)
    buffer = page_aligned(FILE_BYTES)
    buffer[:nbytes] = new
    with closing(RangeWriter(str(source))) as writer:
        writer.write(buffer[:nbytes], offset)
        writer.finish()
    expected = CONTENT[:offset] + new + CONTENT[offset + nbytes :]
    assert source.read_bytes() == expected
    drop_cache(source)
    assert source.read_bytes() == expected


def test_pieces_written_in_any_order_by_several_writers_make_the_file(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(FILE_BYTES))
    borders = [0, ALIGNMENT, 5 * ALIGNMENT, DIRECT_MIN_BYTES, DIRECT_MIN_BYTES + 333, FILE_BYTES]
    pieces = [list(pairwise(borders))[number] for number in (3, 0, 4, 1, 2)]
    buffer = page_aligned(FILE_BYTES)
    for start, stop in pieces:
        with closing(RangeWriter(str(path))) as writer:
            buffer[: stop - start] = CONTENT[start:stop]
            writer.write(buffer[: stop - start], start)
            writer.finish()
    assert path.read_bytes() == CONTENT


def test_a_reader_sees_what_a_writer_has_just_written(source: Path) -> None:
    """Direct writes and cached reads of the same bytes must agree: resuming reads what was written."""
    buffer = page_aligned(FILE_BYTES + ALIGNMENT)
    source.read_bytes()
    with closing(RangeWriter(str(source))) as writer, closing(RangeReader(str(source))) as reader:
        buffer[: DIRECT_MIN_BYTES + 5] = b"\x5a" * (DIRECT_MIN_BYTES + 5)
        writer.write(buffer[: DIRECT_MIN_BYTES + 5], ALIGNMENT)
        reader.read(buffer, 0, 0, FILE_BYTES)
    assert (
        buffer[:FILE_BYTES]
        == CONTENT[:ALIGNMENT] + b"\x5a" * (DIRECT_MIN_BYTES + 5) + CONTENT[DIRECT_MIN_BYTES + 4101 :]
    )


def test_closing_gives_every_file_descriptor_back(source: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for opener in (RangeReader, RangeWriter):
        opener(str(source)).close()
    assert set(os.listdir("/proc/self/fd")) <= before
