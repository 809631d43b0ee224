"""The table of who did what in a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from rv_distributed.units import show_bytes
from rv_distributed.watching import Share

_HEAD: Final[tuple[str, ...]] = (
    "worker",
    "pieces",
    "taken over",
    "read",
    "written",
    "a second",
    "reading",
    "computing",
    "writing",
)
#: With more workers than this, only the nodes are listed.
_MOST_WORKERS: Final = 40


def effort_table(workers: Mapping[str, Share], seconds: float) -> list[str]:
    """Lines of a table by node and worker; none for a run of one worker. ``seconds`` is how long the run streamed."""
    if len(workers) < 2:
        return []
    nodes: dict[str, list[str]] = {}
    for name in sorted(workers):
        nodes.setdefault(name.rpartition(":")[0], []).append(name)
    rows = [_HEAD]
    for node, names in nodes.items():
        rows.append(_row(node, [workers[name] for name in names], seconds))
        if len(workers) <= _MOST_WORKERS:
            rows += [_row(f"  {name.rpartition(':')[2]}", [workers[name]], seconds) for name in names]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def effort_document(workers: Mapping[str, Share]) -> list[dict[str, Any]]:
    """The same as JSON values."""
    return [{"worker": name, **asdict(workers[name])} for name in sorted(workers)]


def _row(label: str, shares: list[Share], seconds: float) -> tuple[str, ...]:
    waits = [sum(times) for times in zip(*((s.read_s, s.compute_s, s.write_s) for s in shares), strict=True)]
    written = sum(share.bytes_written for share in shares)
    return (
        label,
        str(sum(share.pieces for share in shares)),
        str(sum(share.retried for share in shares)),
        show_bytes(sum(share.bytes_read for share in shares)),
        show_bytes(written),
        show_bytes(written / max(seconds, 1e-9)),
        *(f"{wait / max(sum(waits), 1e-9):.0%}" for wait in waits),
    )
