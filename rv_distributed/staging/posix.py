"""The place beside an output where it is made: preallocated shards, records of finished pieces, a lock.

For an output ``/models/out`` everything lies in ``/models/.out.rv/``: ``output-*/`` becomes the output by one
rename, ``plan.json`` says what is being made, ``records.jsonl`` has a line for every finished piece. The
folder outlives a run that fails, and the next run of the same plan continues from it.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, Final

from blake3 import blake3

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, Manifest, manifest_from
from rv_distributed.errors import OutputError
from rv_distributed.identity import identity_digest
from rv_distributed.plan import Piece, Plan, task_of
from rv_distributed.runtime.model import SpanResult
from rv_distributed.staging.records import (
    Held,
    Record,
    check_same,
    pack_held,
    pack_record,
    unpack_held,
    unpack_record,
)
from rv_distributed.storage.lease import leased
from rv_distributed.storage.places import staging_folder
from rv_distributed.storage.publish import (
    create,
    make_folder,
    naming,
    preallocate,
    publish,
    recover,
    remove,
    sync,
    write_durably,
)
from rv_distributed.storage.replacing import unreplaceable

_LOG = logging.getLogger(__name__)
_LOCK: Final = "lock"
_PLAN: Final = "plan.json"
_JOURNAL: Final = "records.jsonl"
_REPLACED: Final = "replaced"
_READ_BYTES: Final = 8 << 20
_CHECK_THREADS: Final = 4


class PosixStaging:
    """As `Staging`, on a file system."""

    def __init__(self, out: str, identity: Mapping[str, Any], *, overwrite: bool, restart: bool) -> None:
        """Take the place for the plan that ``identity`` describes.

        Raises OutputError when the output exists (without ``overwrite``), when another run holds the place, or
        when it holds pieces of another plan (without ``restart``).
        """
        self.out = os.path.abspath(out)
        self.identity = identity
        self.work = staging_folder(self.out)
        """The place itself: a folder beside the output."""
        self._journal_path = os.path.join(self.work, _JOURNAL)
        self._closing = ExitStack()
        try:
            make_folder(self.work)
        except OSError as error:
            raise OutputError(f"{self.work} cannot be made: {error.strerror}. Check the output's folder.") from error
        if os.stat(self.work).st_dev != os.stat(os.path.dirname(self.out)).st_dev:
            raise OutputError(
                f"{self.work} lies on another file system than the output, which one rename publishes. "
                "Remove it, or give another --out."
            )
        with ExitStack() as stack:
            self._lease = stack.enter_context(leased(os.path.join(self.work, _LOCK), subject=self.out))
            recover(self.out, replaced=os.path.join(self.work, _REPLACED))
            self._found = _inode(self.out)
            if self._found is not None and not overwrite:
                raise OutputError(f"{self.out} already exists. Give another --out, or --overwrite to replace it.")
            if kept := unreplaceable(self.out):
                raise OutputError(str(kept))
            self._held = self._claim(restart)
            self.folder = os.path.join(self.work, self._held.folder)
            make_folder(self.folder)
            self._journal = stack.enter_context(open(self._journal_path, "a+", encoding="utf-8", opener=create))
            # A record that a crash tore must not take the next one with it.
            self._journal.write("\n")
            self._closing = stack.pop_all()

    def _claim(self, restart: bool) -> Held:
        """What the place holds from now on: the unfinished run's folder, or a new one.

        Each new one has a name of its own: a worker of an earlier run that was cut off and comes back can never
        write into a later run's files.
        """
        held = None if restart else _read_held(self.work)
        # A run may have published, and been stopped before it could clean up.
        if (
            held is not None
            and os.path.isdir(os.path.join(self.work, held.folder))
            and not _is_published(self.out, held)
        ):
            check_same(self.out, held, self.identity)
            return held
        _empty(self.work)
        held = Held(f"output-{secrets.token_hex(6)}", self.identity)
        self._note(held)
        return held

    def _note(self, held: Held) -> None:
        write_durably(os.path.join(self.work, _PLAN), pack_held(held))

    def prepare(self, plan: Plan) -> None:
        """Reserve the space of every shard."""
        for shard in plan.shards:
            path = os.path.join(self.folder, shard.name)
            try:
                preallocate(path, shard.size)
            except OSError as error:
                raise OutputError(f"{path}: {shard.size} bytes cannot be reserved: {error.strerror}.") from error

    def finished(self, plan: Plan) -> dict[int, tuple[SpanResult, ...]]:
        """Pieces whose record is whole and whose bytes have the digests that it states."""
        records = dict(_records(self._journal_path))
        pieces = [plan.pieces[number] for number in records if number < len(plan.pieces)]

        def holds(piece: Piece) -> bool:
            try:
                return self._holds(plan, piece, records[piece.number])
            except OSError:
                return False

        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            good = [piece.number for piece, good in zip(pieces, pool.map(holds, pieces), strict=True) if good]
        if lost := len(pieces) - len(good):
            told = "%s: of the pieces that an earlier run finished, %d changed since and will be made again"
            _LOG.warning(told, self.out, lost)
        return {number: records[number] for number in good}

    def _holds(self, plan: Plan, piece: Piece, spans: tuple[SpanResult, ...]) -> bool:
        task = task_of(plan, piece)
        if [tensor for tensor, _ in task.parts] != [span.tensor for span in spans]:
            return False
        with open(os.path.join(self.folder, task.shard_name), "rb") as file:
            file.seek(piece.start)
            if file.read(len(task.literal)) != task.literal:
                return False
            for (_, left), recorded in zip(task.parts, spans, strict=True):
                digest = blake3()
                while left > 0 and (data := file.read(min(left, _READ_BYTES))):
                    digest.update(data)
                    left -= len(data)
                if left or digest.hexdigest() != recorded.digest:
                    return False
        return True

    def record(self, record: Record, shard: str) -> None:  # noqa: ARG002 - the piece's number tells
        if self._lease.lost:
            self._lease.check()
        with naming(self._journal_path):
            self._journal.write(f"{pack_record(record)}\n")
            self._journal.flush()

    def write(self, name: str, data: bytes) -> None:
        path = os.path.join(self.folder, name)
        make_folder(os.path.dirname(path))
        with naming(path), open(path, "wb", opener=create) as file:
            file.write(data)

    def show(self, name: str, data: bytes) -> None:
        path = os.path.join(self.work, name)
        with suppress(OSError):
            with open(path + ".new", "wb", opener=create) as file:
                file.write(data)
            os.replace(path + ".new", path)

    def publish(self, manifest: bytes) -> None:
        """Flush everything in the staging folder and make it the output, by one rename."""
        self.write(MANIFEST_FILE, manifest)
        for folder, _, names in os.walk(self.folder, topdown=False):
            for name in names:
                sync(os.path.join(folder, name))
            sync(folder)
        if _inode(self.out) != self._found:
            raise OutputError(
                f"{self.out} was made or replaced by something else during the run. The finished pieces are kept: "
                "move it away, and run again."
            )
        if kept := unreplaceable(self.out):
            raise OutputError(f"{kept} The finished pieces are kept: run again then.")
        self._lease.check()
        # By which a run that is stopped here is known to have published.
        self._note(self._held._replace(manifest=blake3(manifest).hexdigest()))
        publish(self.folder, self.out, replaced=os.path.join(self.work, _REPLACED))

    def close(self) -> None:
        self._closing.close()


def published_folder(out: str, identity: Mapping[str, Any], *, overwrite: bool) -> Manifest | None:
    """As `published`."""
    try:
        with open(os.path.join(out, MANIFEST_FILE), "rb") as file:
            manifest = manifest_from(json.load(file))
        if manifest.identity != identity_digest(identity):
            return None
        if overwrite:
            held = _read_held(staging_folder(out))
            if held is None or not _is_published(out, held):
                return None
        sizes = manifest.sizes
        return manifest if all(os.path.getsize(os.path.join(out, name)) == sizes[name] for name in sizes) else None
    except (OSError, ValueError, RecursionError, OutputError):
        return None


def noted_in_folder(out: str, identity: Mapping[str, Any]) -> set[int]:
    """As `noted`."""
    work = staging_folder(out)
    held = _read_held(work)
    if held is None or not os.path.isdir(os.path.join(work, held.folder)) or _is_published(out, held):
        return set()
    check_same(out, held, identity)
    try:
        return {piece for piece, _ in _records(os.path.join(work, _JOURNAL))}
    except FileNotFoundError:
        return set()


def tidy_folder(out: str) -> None:
    """As `tidy`."""
    work = staging_folder(out)
    if not os.path.isdir(work):
        return
    with suppress(OSError, OutputError), leased(os.path.join(work, _LOCK), subject=out):
        held = _read_held(work)
        if held is not None and not _is_published(out, held):
            return  # a later run's pieces
        _empty(work)
        os.remove(os.path.join(work, _LOCK))
    with suppress(OSError):
        os.rmdir(work)
        sync(os.path.dirname(work))


def _records(path: str) -> Iterator[tuple[int, tuple[SpanResult, ...]]]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = unpack_record(line)
            if record is not None:
                yield record.piece, record.spans


def _read_held(work: str) -> Held | None:
    path = os.path.join(work, _PLAN)
    try:
        with open(path, "rb") as file:
            held = unpack_held(file.read(), path)
    except FileNotFoundError:
        return None
    return held._replace(folder=os.path.basename(held.folder))


def _is_published(out: str, held: Held) -> bool:
    """Whether ``out`` is what the place was held for."""
    try:
        with open(os.path.join(out, MANIFEST_FILE), "rb") as file:
            return blake3(file.read()).hexdigest() == held.manifest
    except OSError:
        return False


def _empty(work: str) -> None:
    """Remove all but the lock; last of all the plan, which says whether the rest is of use."""
    for name in sorted(os.listdir(work), key=lambda name: name == _PLAN):
        if name != _LOCK:
            remove(os.path.join(work, name))


def _inode(path: str) -> tuple[int, int] | None:
    try:
        stat = os.lstat(path)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino
