"""Checking a finished output against its own manifest and tables: every byte is read again."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final

from blake3 import blake3

from rv_distributed.checkpoint.header import LENGTH_BYTES, HeaderError, header_bytes, parse_header
from rv_distributed.checkpoint.index import INDEX_FILE, IndexFormatError, parse_index
from rv_distributed.checkpoint.manifest import (
    MANIFEST_FILE,
    TABLE_FILE,
    Manifest,
    ManifestError,
    ShardEntry,
    manifest_from,
)
from rv_distributed.checkpoint.table import NO_BYTES, PartDigest, TensorRow, digest_of, read_table, shard_digest
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import Finding, InputError, PieceError, Problem, RunError, VerifyError
from rv_distributed.runtime.select import usable_cpus
from rv_distributed.storage import Folder, open_folder, open_reader
from rv_distributed.storage.ranges import ALIGNMENT

_READ_BYTES: Final = 8 << 20
_REMOTE_READS: Final = 16
_REMEDY: Final = "Check the storage and its permissions, and verify again."

VerifyProgress = Callable[[int, int], None]
"""Called with the bytes checked so far and the bytes in all."""


def verify(uri: str, *, quick: bool = False, progress: VerifyProgress | None = None) -> Manifest:
    """Read an output again and compare digests, sizes, headers, index and manifest.

    With ``quick``, all of it but the tensors' bytes. Returns the manifest when all is as it says. Raises VerifyError
    with every difference: flipped bytes with their tensor and the smallest range known, missing, added or renamed
    files; InputError when the folder holds no manifest of ours; RunError when a file cannot be read.
    """
    folder, manifest, findings = open_output(uri)
    sizes = {file.name: file.size for file in folder.files()}
    expected = manifest.sizes
    for name, nbytes in expected.items():
        if name not in sizes:
            findings.append(Finding(name, "is missing"))
        elif sizes[name] != nbytes:
            findings.append(Finding(name, f"has {sizes[name]} bytes instead of {nbytes}"))
    findings += [
        Finding(name, "is not in the manifest") for name in sizes if name not in expected and name != MANIFEST_FILE
    ]
    whole = {name for name, nbytes in expected.items() if sizes.get(name) == nbytes}
    for entry in manifest.files:
        if entry.name in whole and blake3(read_file(folder, entry.name)).hexdigest() != entry.digest:
            findings.append(Finding(entry.name, "differs from what was written"))
    if TABLE_FILE not in whole or any(finding.file == TABLE_FILE for finding in findings):
        raise VerifyError(folder.uri, findings)  # without the table nothing is known of the tensors

    try:
        rows = read_table(read_file(folder, TABLE_FILE))
    except ValueError as error:
        raise VerifyError(folder.uri, [*findings, Finding(TABLE_FILE, str(error))]) from error
    if {row.shard for row in rows} - {shard.name for shard in manifest.shards}:
        findings.append(Finding(TABLE_FILE, "names shards that are not in the manifest"))
    findings += _check_index(folder, manifest, rows) if INDEX_FILE in whole else []
    shards = [shard for shard in manifest.shards if shard.name in whole]
    findings += _check_shards(folder, shards, rows, progress, hashed=not quick)
    if findings:
        raise VerifyError(folder.uri, findings)
    return manifest


def open_output(uri: str) -> tuple[Folder, Manifest, list[Finding]]:
    """The folder of an output, its manifest, and what is found when that was changed but can still be read.

    Raises as `verify`.
    """
    folder = open_folder(uri)
    where = folder.path(MANIFEST_FILE)
    remedy = "Give the folder of a finished output; other checkpoints have nothing to verify against."
    if MANIFEST_FILE not in {file.name for file in folder.files()}:
        raise InputError([Problem(where, "does not exist", remedy)])
    raw = read_file(folder, MANIFEST_FILE)
    try:
        manifest = manifest_from(json.loads(raw))
    except (ManifestError, ValueError, AttributeError, RecursionError) as error:
        raise VerifyError(folder.uri, [Finding(MANIFEST_FILE, str(error))]) from error
    if not manifest.seals(raw):
        return folder, manifest, [Finding(MANIFEST_FILE, "differs from what was written: its digest is another")]
    return folder, manifest, []


def read_file(folder: Folder, name: str, stop: int | None = None) -> bytes:
    """A file of an output up to byte ``stop``, or its end. Raises RunError when it cannot be read."""
    try:
        return folder.read(name, 0, stop)
    except OSError as error:
        raise RunError(f"{folder.path(name)}: cannot be read: {error.strerror or error}. {_REMEDY}") from error


def _check_index(folder: Folder, manifest: Manifest, rows: list[TensorRow]) -> list[Finding]:
    try:
        weight_map = parse_index(read_file(folder, INDEX_FILE))
    except IndexFormatError as error:
        return [Finding(INDEX_FILE, str(error))]
    if weight_map != {row.name: row.shard for row in rows} or len(rows) != manifest.totals.tensors:
        return [Finding(INDEX_FILE, f"does not fit {TABLE_FILE}")]
    return []


def _check_shards(
    folder: Folder,
    shards: list[ShardEntry],
    rows: list[TensorRow],
    progress: VerifyProgress | None,
    *,
    hashed: bool,
) -> list[Finding]:
    by_shard: dict[str, list[TensorRow]] = {shard.name: [] for shard in shards}
    for row in rows:
        if row.shard in by_shard:
            by_shard[row.shard].append(row)
    findings: list[Finding] = []
    jobs: list[tuple[TensorRow, PartDigest]] = []
    for shard in shards:
        found = _check_layout(folder, shard, by_shard[shard.name])
        findings += found
        jobs += [] if found or not hashed else [(row, part) for row in by_shard[shard.name] for part in row.parts]
    total, done = sum(part.stop - part.start for _, part in jobs), 0
    with ThreadPoolExecutor(_REMOTE_READS if is_remote(folder.uri) else 2 * usable_cpus()) as pool:
        digests = pool.map(lambda job: _hash(folder, *job), jobs)
        for (row, part), digest in zip(jobs, digests, strict=True):
            if digest != part.digest:
                findings.append(Finding(row.shard, "differs from what was written", row.name, part.start, part.stop))
            done += part.stop - part.start
            if progress is not None:
                progress(done, total)
    return findings


def _check_layout(folder: Folder, shard: ShardEntry, rows: list[TensorRow]) -> list[Finding]:
    """Compare a shard's header with the table, and both with the digest in the manifest."""
    # By the table, which is as it was written: the length in the header itself may be what was changed.
    stop = min((row.start for row in rows), default=shard.bytes)
    try:
        length = header_bytes(read_file(folder, shard.name, LENGTH_BYTES), file_bytes=shard.bytes)
        raw = read_file(folder, shard.name, LENGTH_BYTES + length)
        entries = parse_header(raw[LENGTH_BYTES:], data_bytes=shard.bytes - len(raw)).entries
    except HeaderError as error:
        return [Finding(shard.name, error.what, error.tensor, 0, stop)]
    laid_out = {name: (e.dtype, e.shape, len(raw) + e.start, len(raw) + e.stop) for name, e in entries.items()}
    if laid_out != {row.name: (row.dtype, row.shape, row.start, row.stop) for row in rows}:
        return [Finding(shard.name, f"has a header that does not fit {TABLE_FILE}", None, 0, stop)]
    for row in rows:
        digests = [part.digest for part in row.parts] or [NO_BYTES]
        borders = [row.start, *(part.stop for part in row.parts)]
        if (
            [part.start for part in row.parts] != borders[:-1]
            or borders[-1] != row.stop
            or row.digest != digest_of(digests)
        ):
            return [Finding(TABLE_FILE, "has parts that do not make up the tensor", row.name)]
    if shard_digest(raw, [part.digest for row in rows for part in row.parts]) != shard.digest:
        return [Finding(shard.name, "has a header that differs from what was written", None, 0, stop)]
    return []


def _hash(folder: Folder, row: TensorRow, part: PartDigest) -> str:
    path = folder.path(row.shard)
    try:
        return _hash_range(path, part.start, part.stop)
    except OSError as error:
        cause = f"cannot be read: {error.strerror or error}. {_REMEDY}"
        raise PieceError(cause, path, part.start, part.stop, (row.name,)) from error


def _hash_range(path: str, start: int, stop: int) -> str:
    digest = blake3()
    buffer = memoryview(mmap.mmap(-1, min(_READ_BYTES, stop - start) + 2 * ALIGNMENT))
    with closing(open_reader(path)) as reader:
        while start < stop:
            count = min(_READ_BYTES, stop - start)
            at = start % ALIGNMENT
            reader.read(buffer, at, start, count)
            digest.update(buffer[at : at + count])
            start += count
    return digest.hexdigest()
