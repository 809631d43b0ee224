"""What the table of pieces says of a run: bytes written over time and by worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rv_distributed.checkpoint.pieces import PieceRow

_BINS = 60
#: With all others as one they are as many as there are colours.
_WORKERS = 5


class WorkerShare(NamedTuple):
    """What one worker did."""

    worker: str
    pieces: int
    bytes_written: int
    read_s: float
    compute_s: float
    write_s: float
    retried: int
    """Pieces that others had tried before."""


class Throughput(NamedTuple):
    """Bytes a second, by worker, in equal spans of the run."""

    ends_s: list[float]
    """Where each span ends, in seconds from the start of the run."""
    rates: dict[str, list[float]]
    """Of the workers that wrote most; of the others together, as the last one."""


def shares(pieces: Sequence[PieceRow]) -> list[WorkerShare]:
    """A share for each worker, in the order of their names. Pieces kept from an earlier run are nobody's."""
    found: dict[str, list[PieceRow]] = {}
    for piece in pieces:
        if piece.worker is not None:
            found.setdefault(piece.worker, []).append(piece)
    return [
        WorkerShare(
            worker,
            len(own),
            sum(piece.bytes_written or 0 for piece in own),
            sum(piece.read_s or 0.0 for piece in own),
            sum(piece.compute_s or 0.0 for piece in own),
            sum(piece.write_s or 0.0 for piece in own),
            sum((piece.attempt or 1) > 1 for piece in own),
        )
        for worker, own in sorted(found.items())
    ]


def throughput(pieces: Sequence[PieceRow], most_bins: int = _BINS) -> Throughput:
    """A piece counts where it was finished; spans are no shorter than what makes some pieces in each likely."""
    made = [piece for piece in pieces if piece.worker is not None and piece.done_s is not None]
    if not made:
        return Throughput([], {})
    run_s = max(piece.done_s or 0.0 for piece in made) or 1.0
    bins = max(1, min(most_bins, len(made) // 4))
    width = run_s / bins
    rates: dict[str, list[float]] = {}
    for piece in sorted(made, key=lambda piece: piece.worker or ""):
        row = rates.setdefault(piece.worker or "", [0.0] * bins)
        row[min(bins - 1, int((piece.done_s or 0.0) / width))] += (piece.bytes_written or 0) / width
    written = sorted(rates, key=lambda worker: -sum(rates[worker]))
    if len(written) > _WORKERS + 1:
        others = [rates.pop(worker) for worker in written[_WORKERS:]]
        rates[f"{len(others)} others"] = [sum(column) for column in zip(*others, strict=True)]
    return Throughput([width * (number + 1) for number in range(bins)], rates)
