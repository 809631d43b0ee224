"""Counters that a cluster exports to Prometheus where it has ``ray[default]``; elsewhere they count for nobody.

Ray prefixes the names with ``ray_``, and ends those of counters with ``_total``. Seconds and bytes are counters and
not histograms, whose sums Ray makes of the middles of their buckets. No tensor's name is a tag: there are too many.
"""

from __future__ import annotations

from typing import Final

from ray.util.metrics import Counter, Gauge

from rv_distributed.runtime.model import PieceResult

_COUNTERS: Final = {
    "rv_read_bytes": "Bytes of tensor data read.",
    "rv_written_bytes": "Bytes of output written and flushed.",
    "rv_pieces_done": "Pieces finished.",
    "rv_read_wait_seconds": "Seconds that streams waited for reads.",
    "rv_compute_wait_seconds": "Seconds that streams computed, or waited for a processor.",
    "rv_write_wait_seconds": "Seconds that streams waited for writes.",
}
_RETRIED: Final = "rv_pieces_retried"
_PROGRESS: Final = "rv_progress_ratio"
METRIC_NAMES: Final = (*_COUNTERS, _RETRIED, _PROGRESS)


class WorkerMetrics:
    """What one worker did."""

    def __init__(self, job: str) -> None:
        self._counters = {name: Counter(name, text, tag_keys=("job",)) for name, text in _COUNTERS.items()}
        for counter in self._counters.values():
            counter.set_default_tags({"job": job})

    def add(self, result: PieceResult) -> None:
        """Count a finished piece."""
        amounts = (result.bytes_read, result.bytes_written, 1, *result.waited)
        for counter, amount in zip(self._counters.values(), amounts, strict=True):
            if amount > 0:
                counter.inc(amount)


class DriverMetrics:
    """What the driver knows."""

    def __init__(self, job: str) -> None:
        self._retried = Counter(_RETRIED, "Pieces given to another worker.", tag_keys=("job",))
        self._progress = Gauge(_PROGRESS, "Share of the run's pieces that are finished.", tag_keys=("job",))
        for metric in (self._retried, self._progress):
            metric.set_default_tags({"job": job})

    def retry(self, pieces: int) -> None:
        """Count pieces whose worker was lost."""
        self._retried.inc(pieces)

    def progress(self, done: int, pieces: int) -> None:
        """Show how far the run is, with what earlier runs of it have finished."""
        self._progress.set(done / pieces if pieces else 1.0)
