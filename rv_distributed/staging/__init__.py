"""Where an output is made before it is one: a folder beside it, or its own prefix of an object store.

`open_staging` takes the place for a run; then `Staging.finished` says what an earlier run has left, `Staging.prepare`
makes room, `Staging.record` is called for every finished piece, `Staging.write` for the small files, and
`Staging.publish` once. Whatever ends the run, `Staging.close` lets go of the place and leaves the rest to the next run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rv_distributed.checkpoint.manifest import Manifest
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.plan import Plan
from rv_distributed.runtime.model import SpanResult
from rv_distributed.staging.objects import ObjectStaging, noted_in_object, published_object, tidy_object
from rv_distributed.staging.posix import PosixStaging, noted_in_folder, published_folder, tidy_folder
from rv_distributed.staging.records import Record
from rv_distributed.staging.unlike import unlike


class Staging(Protocol):
    """The staging place of one output, held by this process."""

    @property
    def out(self) -> str: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What is made here."""
        ...

    @property
    def folder(self) -> str:
        """Where workers write shards, as `open_writer` takes it."""
        ...

    def finished(self, plan: Plan) -> dict[int, tuple[SpanResult, ...]]:
        """The pieces that an earlier run finished, by number."""
        ...

    def prepare(self, plan: Plan) -> None:
        """Make the place ready for workers. Raises OutputError when there is no room."""
        ...

    def record(self, record: Record, shard: str) -> None:
        """Note that a piece of a shard is finished. Raises RunError when another run has taken the place over."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put a small file beside the shards. Raises OSError."""
        ...

    def show(self, name: str, data: bytes) -> None:
        """Put a file where people and their monitors see it while the run goes on; that it cannot be written is no
        reason to stop."""
        ...

    def publish(self, manifest: bytes) -> None:
        """Make it the output: all that was written, and the manifest.

        Raises OutputError when something else has come into the output's place, RunError when another run has taken
        over this one, and OSError.
        """
        ...

    def close(self) -> None:
        """Let go of the place; what is in it stays for the next run."""
        ...


def open_staging(out: str, identity: Mapping[str, Any], *, overwrite: bool, restart: bool) -> Staging:
    """Take the place of the output ``out`` for the plan that ``identity`` describes.

    Raises OutputError when the output exists (without ``overwrite``), when another run holds the place, or when it
    holds pieces of another plan (without ``restart``).
    """
    kind = ObjectStaging if is_remote(out) else PosixStaging
    return kind(out, identity, overwrite=overwrite, restart=restart)


def published(out: str, identity: Mapping[str, Any], *, overwrite: bool) -> Manifest | None:
    """The manifest of ``out``, when the run that ``identity`` describes has made it and all its files are there.

    With ``overwrite`` only as long as that run has not cleaned up: then it was stopped right after it published, and
    what it replaced is what was to be overwritten.
    """
    find = published_object if is_remote(out) else published_folder
    return find(out, identity, overwrite=overwrite)


def noted(out: str, identity: Mapping[str, Any]) -> set[int]:
    """The pieces that an unfinished run has noted as finished, by number; nothing of them is read.

    Raises OutputError when that run was of another plan than ``identity`` describes.
    """
    return (noted_in_object if is_remote(out) else noted_in_folder)(out, identity)


def tidy(out: str) -> None:
    """Remove what the run that published ``out`` has left beside it. The output is there: nothing that goes wrong here
    makes the run a failure, and the next one removes what is left."""
    (tidy_object if is_remote(out) else tidy_folder)(out)


__all__ = ["Record", "Staging", "noted", "open_staging", "published", "tidy", "unlike"]
