"""Whole trees of processes, to be stopped or killed at once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def tree_of(roots: Iterable[int]) -> list[int]:
    """The processes ``roots`` and all that descend from them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = list(roots)
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid and child not in found]
    return found


def signal_all(pids: Iterable[int], signum: int) -> None:
    """Send a signal to all of them that are left."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only to be reaped."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
