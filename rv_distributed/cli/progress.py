"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rv_distributed.cli.terminal import warn
from rv_distributed.cli.units import show_bytes, show_seconds
from rv_distributed.job import Job, Progress, ProgressCallback

_LINE_EVERY_S = 5.0


@contextmanager
def progress_display(job: Job, *, shown: bool) -> Iterator[ProgressCallback | None]:
    """The callback to give to `Job.run`, or None when nothing is to be shown."""
    if not shown:
        yield None
    elif sys.stderr.isatty():
        with _bar(job) as callback:
            yield callback
    else:
        yield _Lines()


@contextmanager
def _bar(job: Job) -> Iterator[ProgressCallback]:
    # Imported here: rich takes a while, and most commands never draw.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=job.bytes_out)

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.bytes_written, total=progress.bytes_total)

        yield show


class _Lines:
    """Prints a line when enough time has passed since the last one."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last < _LINE_EVERY_S:
            return
        self._last = now
        speed = progress.bytes_written / max(now - self._began, 1e-9)
        left = (progress.bytes_total - progress.bytes_written) / max(speed, 1e-9)
        warn(
            f"{progress.bytes_written / max(1, progress.bytes_total):4.0%}  "
            f"{show_bytes(progress.bytes_written)} of {show_bytes(progress.bytes_total)} written, "
            f"{show_bytes(speed)}/s, {show_seconds(left)} left"
        )
