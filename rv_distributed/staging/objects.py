"""Making an output where it is going to be, in an object store, which renames nothing.

Each shard is an object that one upload makes, whole or not at all. Until the manifest stands beside them, they are no
output. What a run notes lies below ``.rv/`` in the same prefix: ``plan.json`` says what is being made, ``records/``
has an object for every finished shard, with the state that the shard's own object has since.

A prefix is open to others at any time. So the plan also names what is ours there, before it is made: nothing else is
ever deleted, and where there is anything else, nothing is published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, Final

from blake3 import blake3

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, Manifest, ManifestError, manifest_from, names_in
from rv_distributed.checkpoint.sidecars import OWN_NAMES
from rv_distributed.errors import OutputError, RunError
from rv_distributed.identity import identity_digest
from rv_distributed.plan import Plan, task_of
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
from rv_distributed.storage import open_store
from rv_distributed.storage.object_lease import leased_object
from rv_distributed.storage.objects import OWN_FOLDER, PARALLEL_READS, files_among, patiently, read_all
from rv_distributed.storage.protocols import ObjectStore, StoredObject
from rv_distributed.storage.replacing import some_of

_PLAN: Final = f"{OWN_FOLDER}plan.json"
_LOCK: Final = f"{OWN_FOLDER}lock.json"
_RECORDS: Final = f"{OWN_FOLDER}records/"


class ObjectStaging:
    """As `Staging`, in an object store."""

    def __init__(self, out: str, identity: Mapping[str, Any], *, overwrite: bool, restart: bool) -> None:
        """Take the place for the plan that ``identity`` describes. Raises as `open_staging`."""
        self.out = self.folder = out
        self.identity = identity
        self._place = _Place(out)
        self._states: dict[str, str] = {}
        """Of the shards that are finished, by name."""
        self._closing = ExitStack()
        with ExitStack() as stack:
            lock = self._place.key(_LOCK)
            self._lease = stack.enter_context(leased_object(self._place.store, lock, subject=out))
            if not overwrite and self._place.has(MANIFEST_FILE):
                raise OutputError(f"{out} already exists. Give another --out, or --overwrite to replace it.")
            self._held = self._claim(restart)
            self._ours = {*self._held.ours, *self._place.names_of_output()}
            self._closing = stack.pop_all()

    def _claim(self, restart: bool) -> Held:
        try:
            held = self._place.held()
        except OutputError:
            if not restart:
                raise
            held = None
        if held is not None and self._place.is_published(held):
            held = None
        if held is not None and not restart:
            check_same(self.out, held, self.identity)
            return held
        self._place.delete_records()
        # In one step, or what an unfinished run has made would be nobody's.
        held = Held("", self.identity, ours=held.ours if held is not None else ())
        self._place.write(_PLAN, pack_held(held))
        return held

    def prepare(self, plan: Plan) -> None:
        """Remove what an earlier run left of uploads, and the manifest that is to be replaced: from here on what lies
        here is no output."""
        self._take(_names_of(plan))
        self._place.abort_uploads()
        self._place.delete([MANIFEST_FILE])

    def _take(self, names: Iterable[str]) -> None:
        """Note that the objects of these names are ours, before they are made."""
        self._ours.update(names)
        if not self._ours.issubset(self._held.ours):
            self._lease.check()
            self._held = self._held._replace(ours=sorted(self._ours))
            self._place.write(_PLAN, pack_held(self._held))

    def _check_others(self, present: Iterable[str], ours: Set[str]) -> None:
        """Raise OutputError when somebody has put something of their own here."""
        if others := files_among(present) - ours:
            raise OutputError(
                f"{self.out} holds what is not of the output: {some_of(others)}. "
                "Move that away, or give another --out. The finished pieces are kept: run again then."
            )

    def finished(self, plan: Plan) -> dict[int, tuple[SpanResult, ...]]:
        """Pieces whose record is whole and whose object is the one that it tells of.

        Raises OutputError when the place holds what no run has made.
        """
        present = self._place.listed()
        self._check_others(present, self._ours | _names_of(plan))
        names = [name for name in present if name.startswith(_RECORDS)]
        with ThreadPoolExecutor(PARALLEL_READS) as pool:
            lines = pool.map(lambda name: self._place.read(name).decode(errors="replace"), names)
            records = [record for record in map(unpack_record, lines) if record is not None]
        found = {}
        for record in records:
            if record.piece >= len(plan.pieces):
                continue
            task = task_of(plan, plan.pieces[record.piece])
            whole = [tensor for tensor, _ in task.parts] == [span.tensor for span in record.spans]
            shard = present.get(task.shard_name)
            if whole and record.state and shard is not None and shard.state == record.state:
                found[record.piece] = record.spans
                self._states[task.shard_name] = record.state
        return found

    def record(self, record: Record, shard: str) -> None:
        if self._lease.lost:
            self._lease.check()
        self._states[shard] = record.state
        self._place.write(f"{_RECORDS}{record.piece:06}", pack_record(record).encode())

    def write(self, name: str, data: bytes) -> None:
        self._take([name])
        self._place.write(name, data)
        self._states[name] = ""

    def show(self, name: str, data: bytes) -> None:
        with suppress(OSError):
            self._place.store.put(self._place.key(OWN_FOLDER + name), data)

    def publish(self, manifest: bytes) -> None:
        """Check that everything is there, and write the manifest, where there is none."""
        self._lease.check()
        # A worker that was given up may still be sending; what it would make now could be another run's.
        self._place.abort_uploads()
        present = self._place.listed()
        for name, state in self._states.items():
            if name not in present or (state and present[name].state != state):
                raise RunError(f"{self.out}: {name} was removed or replaced by something else; run again to make it")
        if MANIFEST_FILE in present:
            raise self._overtaken()
        self._check_others(present, self._ours)
        self._place.delete(sorted(files_among(present) - set(self._states)))
        digest = blake3(manifest).hexdigest()
        self._place.write(_PLAN, pack_held(self._held._replace(manifest=digest)))
        self._lease.check()
        try:
            self._place.write(MANIFEST_FILE, manifest, only_new=True)
        except FileExistsError:
            # Our own, when the answer to a first try was lost.
            if self._place.read(MANIFEST_FILE) != manifest:
                raise self._overtaken() from None

    def _overtaken(self) -> OutputError:
        return OutputError(f"{self.out} was made by another run meanwhile. Give another --out.")

    def close(self) -> None:
        self._closing.close()


def published_object(out: str, identity: Mapping[str, Any], *, overwrite: bool) -> Manifest | None:
    """As `published`."""
    try:
        place = _Place(out)
        manifest = manifest_from(json.loads(place.read(MANIFEST_FILE)))
        if manifest.identity != identity_digest(identity):
            return None
        held = place.held() if overwrite else None
        if overwrite and (held is None or not place.is_published(held)):
            return None
        present = place.listed()
        whole = all(name in present and present[name].size == size for name, size in manifest.sizes.items())
        return manifest if whole else None
    except (OSError, ValueError, RecursionError, OutputError):
        return None


def noted_in_object(out: str, identity: Mapping[str, Any]) -> set[int]:
    """As `noted`."""
    place = _Place(out)
    held = place.held()
    if held is None or place.is_published(held):
        return set()
    check_same(out, held, identity)
    numbers = (name.removeprefix(_RECORDS) for name in place.listed(_RECORDS))
    # Some tools make an empty object for each folder.
    return {int(number) for number in numbers if number.isdecimal()}


def tidy_object(out: str) -> None:
    """As `tidy`."""
    place = _Place(out)
    with suppress(OSError, OutputError):
        held = place.held()
        if (held is None or place.is_published(held)) and not place.has(_LOCK):
            place.clear()


def _names_of(plan: Plan) -> set[str]:
    """The objects that an output is made of, but for those that only some have: `ObjectStaging.write` notes these."""
    return {*OWN_NAMES, *(shard.name for shard in plan.shards), *(sidecar.name for sidecar in plan.sidecars)}


class _Place:
    """The prefix of an output."""

    def __init__(self, out: str) -> None:
        self.out = out
        self.store: ObjectStore
        self.store, self._prefix = open_store(out)

    def key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def listed(self, below: str = "") -> dict[str, StoredObject]:
        """All objects whose name begins so, by name."""
        skip = len(self.key(""))
        found = patiently(lambda: list(self.store.list(self.key(below))))
        return {item.key[skip:]: item for item in found}

    def has(self, name: str) -> bool:
        return name in self.listed(name)

    def read(self, name: str) -> bytes:
        return read_all(self.store, self.key(name))

    def write(self, name: str, data: bytes, *, only_new: bool = False) -> None:
        patiently(lambda: self.store.put(self.key(name), data, only_new=only_new))

    def delete(self, names: list[str]) -> None:
        patiently(lambda: self.store.delete([self.key(name) for name in names]))

    def abort_uploads(self) -> None:
        patiently(lambda: self.store.abort_uploads(self.key("")))

    def held(self) -> Held | None:
        """What the place is held for. Raises OutputError when that cannot be read."""
        try:
            return unpack_held(self.read(_PLAN), f"{self.out}/{_PLAN}")
        except FileNotFoundError:
            return None

    def is_published(self, held: Held) -> bool:
        try:
            return blake3(self.read(MANIFEST_FILE)).hexdigest() == held.manifest
        except FileNotFoundError:
            return False

    def names_of_output(self) -> set[str]:
        """The output's files that are here, where there is an output that tells them."""
        try:
            return names_in(self.read(MANIFEST_FILE)) & files_among(self.listed())
        except (FileNotFoundError, ManifestError):
            return set()

    def delete_records(self) -> None:
        self.delete([name for name in self.listed(OWN_FOLDER) if name not in (_LOCK, _PLAN)])

    def clear(self) -> None:
        """Remove what a run notes; last of all what says whether the rest is of use."""
        self.delete_records()
        self.delete([_PLAN])
