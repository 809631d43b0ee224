"""Progress and events on stderr: a bar on a terminal, a line every few seconds elsewhere, JSON lines on request."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from rv_distributed.cli.options import LogFormat
from rv_distributed.cli.terminal import warn
from rv_distributed.errors import one_line
from rv_distributed.logs import COMPILING, JsonLines
from rv_distributed.units import show_bytes, show_seconds
from rv_distributed.watching import Progress, Share

_LINE_EVERY_S = 5.0
_LOG = logging.getLogger("rv_distributed.progress")


class Display:
    """Takes a run's progress, and shows it by ``show``."""

    def __init__(self, show: Callable[[Progress], None]) -> None:
        self._show = show
        self.workers: Mapping[str, Share] = {}
        """What each worker has done so far."""

    def __call__(self, progress: Progress) -> None:
        self.workers = progress.workers
        self._show(progress)


@contextmanager
def progress_display(
    bytes_total: int | None, log_format: LogFormat, *, shown: bool, what: str = "written"
) -> Iterator[Display]:
    """The callback to give to `Job.run`; while it is used, what the library logs is shown as well.

    ``bytes_total`` is what a bar begins with, None where it is not known yet; ``what`` says what is done to the bytes.
    """
    with _events(log_format, shown=shown):
        if not shown:
            yield Display(lambda _: None)
        elif log_format == "json":
            yield Display(_every_few_seconds(log_as_json))
        elif sys.stderr.isatty():
            with _bar(bytes_total) as show:
                yield Display(show)
        else:
            yield Display(_every_few_seconds(partial(_warn_as_text, what)))


@contextmanager
def bytes_display(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """The callback for a command that is no run: it is told the bytes that are done so far, and those in all."""
    with progress_display(None, "text", shown=shown, what=what) as display:
        yield lambda done, total: display(Progress(0, 0, 0, done, total, 0.0, {}))


@contextmanager
def _events(log_format: LogFormat, *, shown: bool) -> Iterator[None]:
    """Show what the library logs on stderr: as text only what is amiss, and why nothing happens at first."""
    logger = logging.getLogger("rv_distributed")
    handler = _Handler()
    if log_format == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.name == COMPILING)
    level = logger.level
    logger.setLevel(logging.INFO if shown else logging.CRITICAL)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if self.formatter is None:
            text = one_line(text)
            text = f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text
        warn(text)


@contextmanager
def _bar(bytes_total: int | None) -> Iterator[Callable[[Progress], None]]:
    # Imported here: rich takes a while, and most commands never draw.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=bytes_total)

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.bytes_written, total=progress.bytes_total)

        yield show


def _every_few_seconds(show: Callable[[Progress, float], None]) -> Callable[[Progress], None]:
    """``show`` with the speed in bytes a second, when enough time has passed since the last time.

    The speed is that since the first piece was finished: what came before is mostly the start of the workers. Right
    after it, when each worker finishes its first, there is none to tell yet.
    """
    shown = 0.0
    first: tuple[float, int] | None = None

    def limited(progress: Progress) -> None:
        nonlocal shown, first
        now = time.monotonic()
        if first is None:
            shown, first = now, (now, progress.bytes_written)
        elif now - shown >= _LINE_EVERY_S:
            shown = now
            began, written = first
            show(progress, (progress.bytes_written - written) / max(now - began, 1e-9))

    return limited


def _warn_as_text(what: str, progress: Progress, speed: float) -> None:
    left = (progress.bytes_total - progress.bytes_written) / max(speed, 1e-9)
    warn(
        f"{progress.bytes_written / max(1, progress.bytes_total):4.0%}  "
        f"{show_bytes(progress.bytes_written)} of {show_bytes(progress.bytes_total)} {what}, "
        f"{show_bytes(speed)}/s, {show_seconds(left)} left"
    )


def log_as_json(progress: Progress, speed: float) -> None:
    """Log a line of progress; ``speed`` in bytes a second."""
    fields = {
        "pieces": progress.pieces,
        "pieces_total": progress.pieces_total,
        "bytes_written": progress.bytes_written,
        "bytes_total": progress.bytes_total,
        "bytes_per_s": round(speed),
        "workers": len(progress.workers),
    }
    _LOG.info("progress", extra={"fields": fields})
