"""The place beside an output where it is made: preallocated shards, records of finished pieces, a lock.

For an output ``/models/out`` everything lies in ``/models/.out.rv/``: ``output-*/`` becomes the output by one
rename, ``plan.json`` says what is being made, ``records.jsonl`` has a line for every finished piece. The
folder outlives a run that fails, and the next run of the same plan continues from it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, Final

from blake3 import blake3

from rv_distributed.errors import OutputError
from rv_distributed.plan import Piece, Plan, task_of
from rv_distributed.runtime.model import SpanResult
from rv_distributed.storage.places import staging_folder
from rv_distributed.storage.publish import (
    create,
    locked,
    make_folder,
    preallocate,
    publish,
    recover,
    remove,
    sync,
    write_durably,
)

_LOCK: Final = "lock"
_READ_BYTES: Final = 8 << 20
_CHECK_THREADS: Final = 4


class Staging:
    """The staging place of one output, held by this process."""

    def __init__(self, out: str, identity: Mapping[str, Any], *, overwrite: bool, restart: bool) -> None:
        """Take the place for the plan that ``identity`` describes.

        Raises OutputError when the output exists (without ``overwrite``), when another run holds the place, or
        when it holds pieces of another plan (without ``restart``).
        """
        self.out = os.path.abspath(out)
        self._work = staging_folder(self.out)
        self._journal_path = os.path.join(self._work, "records.jsonl")
        self._overwrite = overwrite
        self._replaced = os.path.join(self._work, "replaced")
        self._closing = ExitStack()
        try:
            make_folder(self._work)
        except OSError as error:
            raise OutputError(f"{self._work} cannot be made: {error.strerror}. Check the output's folder.") from error
        with ExitStack() as stack:
            stack.enter_context(locked(os.path.join(self._work, _LOCK), subject=self.out))
            recover(self.out, replaced=self._replaced)
            if os.path.lexists(self.out) and not overwrite:
                raise OutputError(f"{self.out} already exists. Give another --out, or --overwrite to replace it.")
            self.folder = self._claim(identity, restart)
            self._journal = stack.enter_context(open(self._journal_path, "a+", encoding="utf-8", opener=create))
            # A record that a crash tore must not take the next one with it.
            self._journal.write("\n")
            self._closing = stack.pop_all()

    def _claim(self, identity: Mapping[str, Any], restart: bool) -> str:
        """The folder to make the output in: that of the unfinished run, or a new one.

        Each new one has a name of its own: a worker of an earlier run that was cut off and comes back can never
        write into a later run's files.
        """
        path = os.path.join(self._work, "plan.json")
        if os.path.exists(path) and not restart:
            try:
                with open(path, encoding="utf-8") as file:
                    held = json.load(file)
                name, held_identity = held["folder"], held["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{path}: what an unfinished run was making cannot be read ({error!r}). "
                    "Give --restart to throw its pieces away."
                ) from None
            if not os.path.isdir(os.path.join(self._work, os.path.basename(name))):
                # That run published, and was stopped before it could clean up.
                return self._claim(identity, restart=True)
            if held_identity != json.loads(json.dumps(identity)):
                difference = _difference(held_identity, identity)
                raise OutputError(
                    f"{self.out}: an unfinished run was begun with other inputs or options ({difference}). "
                    "Run that command again to finish it, or give --restart to throw its pieces away."
                )
        else:
            self._empty()
            name = f"output-{secrets.token_hex(6)}"
            write_durably(path, json.dumps({"folder": name, "identity": identity}, indent=2).encode())
        folder = os.path.join(self._work, os.path.basename(name))
        make_folder(folder)
        return folder

    def _empty(self) -> None:
        """Remove all but the lock."""
        for name in os.listdir(self._work):
            if name != _LOCK:
                remove(os.path.join(self._work, name))

    def preallocate(self, plan: Plan) -> None:
        """Reserve the space of every shard. Raises OutputError when it is not there."""
        for shard in plan.shards:
            path = os.path.join(self.folder, shard.name)
            try:
                preallocate(path, shard.size)
            except OSError as error:
                raise OutputError(f"{path}: {shard.size} bytes cannot be reserved: {error.strerror}.") from error

    def finished(self, plan: Plan) -> dict[int, tuple[SpanResult, ...]]:
        """The pieces that an earlier run finished, by number: those whose record is whole and whose bytes
        have the digests that it states."""
        records = dict(self._records())
        pieces = [plan.pieces[number] for number in records if number < len(plan.pieces)]

        def holds(piece: Piece) -> bool:
            try:
                return self._holds(plan, piece, records[piece.number])
            except OSError:
                return False

        with ThreadPoolExecutor(_CHECK_THREADS) as pool:
            return {
                piece.number: records[piece.number]
                for piece, good in zip(pieces, pool.map(holds, pieces), strict=True)
                if good
            }

    def _records(self) -> Iterator[tuple[int, tuple[SpanResult, ...]]]:
        with open(self._journal_path, encoding="utf-8", errors="replace") as file:
            for line in file:
                check, _, text = line.rstrip("\n").partition(" ")
                if check != _check(text):
                    continue  # torn by a crash while it was written
                number, spans = json.loads(text)
                yield number, tuple(SpanResult(*span) for span in spans)

    def _holds(self, plan: Plan, piece: Piece, spans: tuple[SpanResult, ...]) -> bool:
        task = task_of(plan, piece)
        if [span.tensor for span in task.spans] != [span.tensor for span in spans]:
            return False
        with open(os.path.join(self.folder, task.shard_name), "rb") as file:
            file.seek(piece.start)
            if file.read(len(task.literal)) != task.literal:
                return False
            for span, recorded in zip(task.spans, spans, strict=True):
                digest, left = blake3(), span.stop - span.start
                while left > 0 and (data := file.read(min(left, _READ_BYTES))):
                    digest.update(data)
                    left -= len(data)
                if left or digest.hexdigest() != recorded.digest:
                    return False
        return True

    def record(self, piece: int, spans: tuple[SpanResult, ...]) -> None:
        """Note that a piece is finished."""
        text = json.dumps([piece, [list(span) for span in spans]])
        self._journal.write(f"{_check(text)} {text}\n")
        self._journal.flush()

    def publish(self) -> None:
        """Flush everything in the staging folder and make it the output, by one rename."""
        for folder, _, names in os.walk(self.folder, topdown=False):
            for name in names:
                sync(os.path.join(folder, name))
            sync(folder)
        if os.path.lexists(self.out) and not self._overwrite:
            raise OutputError(f"{self.out} appeared while the run was going on; the finished pieces are kept")
        publish(self.folder, self.out, replaced=self._replaced)
        # The output is there: nothing that goes wrong from here on makes the run a failure, and network file
        # systems keep the names of files that are still open.
        with suppress(OSError):
            self._journal.close()
            self._empty()
            os.remove(os.path.join(self._work, _LOCK))
        self.close()
        with suppress(OSError):
            os.rmdir(self._work)
            sync(os.path.dirname(self.out))

    def close(self) -> None:
        """Let go of the place; what is in it stays for the next run."""
        self._closing.close()


def _check(text: str) -> str:
    return blake3(text.encode()).hexdigest(16)


def _difference(held: Any, wanted: Any, path: str = "") -> str:
    """The first place where two documents differ, in words."""
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in [*held, *wanted]:
            if held.get(key) != wanted.get(key):
                return _difference(held.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    if isinstance(held, list) and isinstance(wanted, list | tuple) and len(held) == len(wanted):
        for number, (one, other) in enumerate(zip(held, wanted, strict=True)):
            if one != other:
                return _difference(one, other, f"{path}[{number}]")
    return f"{path}: then {held!r:.120}, now {wanted!r:.120}"
