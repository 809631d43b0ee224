"""What a run tells of itself while it goes on: to a callback, and in a small file beside the staged output."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import Final, Literal

from rv_distributed.errors import one_line
from rv_distributed.runtime.model import PieceResult
from rv_distributed.staging import Staging

PROGRESS_FILE: Final = "progress.json"
_WRITE_EVERY_S: Final = 1.0

State = Literal["running", "committing", "stopped"]


@dataclass(frozen=True, slots=True)
class Share:
    """What one worker did in a run."""

    pieces: int = 0
    retried: int = 0
    """Of them, pieces that other workers had begun and were lost with."""
    bytes_read: int = 0
    bytes_written: int = 0
    read_s: float = 0.0
    """Seconds of its streams, each of which has its own; so too the next two."""
    compute_s: float = 0.0
    write_s: float = 0.0
    first_s: float = 0.0
    """When its first piece was finished, in seconds since the run began to stream."""
    last_s: float = 0.0

    def plus(self, result: PieceResult, now_s: float) -> Share:
        """With one more piece, finished at ``now_s``."""
        return Share(
            self.pieces + 1,
            self.retried + (result.attempt > 1),
            self.bytes_read + result.bytes_read,
            self.bytes_written + result.bytes_written,
            self.read_s + result.waited.read_s,
            self.compute_s + result.waited.compute_s,
            self.write_s + result.waited.write_s,
            self.first_s if self.pieces else now_s,
            now_s,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, after a piece."""

    pieces: int
    """Finished, with those kept from an earlier run."""
    pieces_total: int
    pieces_kept: int
    bytes_written: int
    """Of output, in all outputs, by this run."""
    bytes_total: int
    """What this run will have written at its end."""
    seconds: float
    """Since the run began to stream."""
    workers: Mapping[str, Share]
    """What each worker did, by its name, ``host:pid``."""


ProgressCallback = Callable[[Progress], None]


class Watch:
    """Keeps count of the results of a run and tells of them. ``places`` are those that get a progress file."""

    def __init__(
        self, *, pieces: int, kept: int, bytes_total: int, places: Sequence[Staging], callback: ProgressCallback | None
    ) -> None:
        self._began = self._wrote = time.monotonic()
        self._places = places
        self._callback = callback
        self._workers: dict[str, Share] = {}
        self._now = Progress(kept, pieces, kept, 0, bytes_total, 0.0, self._workers)
        self._write("running")

    @property
    def workers(self) -> Mapping[str, Share]:
        """What each worker did."""
        return self._workers

    def add(self, result: PieceResult) -> None:
        """Count a finished piece."""
        seconds = time.monotonic() - self._began
        self._workers[result.worker] = self._workers.get(result.worker, Share()).plus(result, seconds)
        written = self._now.bytes_written + result.bytes_written
        self._now = replace(self._now, pieces=self._now.pieces + 1, bytes_written=written, seconds=seconds)
        if self._callback is not None:
            self._callback(self._now)
        if time.monotonic() - self._wrote >= _WRITE_EVERY_S:
            self._write("running")

    def committing(self) -> None:
        """All pieces are finished."""
        self._write("committing")

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """The run ends here; after an error, another may resume it."""
        if error is not None:
            self._write("stopped", f"{type(error).__name__}: {one_line(str(error))}")

    def _write(self, state: State, why: str | None = None) -> None:
        """Replace the progress files."""
        self._wrote = time.monotonic()
        document = {
            "schema_version": 1,
            "state": state,
            "why": why,
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **asdict(self._now),
        }
        for place in self._places:
            place.show(PROGRESS_FILE, json.dumps(document, indent=2).encode())
