"""Running commands and measuring them: wall time, CPU time, and the memory of a whole process tree.

`run` runs one command to its end. `in_turn` runs two or more sides A B A B …, so that whatever else the
machine does meets all of them, and `ratios` compares them round by round. `warm` and `cold` put input
files into the page cache or out of it. Memory is only sampled when asked for: looking at the page tables of
a process holds it up, so a run gives honest seconds or a peak, not both.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal, NamedTuple

CacheState = Literal["warm", "cold"]

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SAMPLE_S: Final = 0.03
_READ_BYTES: Final = 8 << 20
#: More of the free memory than this cannot be counted on to stay page cache.
_CACHE_SHARE: Final = 0.6


class CommandError(Exception):
    """A measured command failed: the text has the command, its status and the end of what it said."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a command."""

    wall_s: float
    """From the start of the process to its end."""
    cpu_s: float
    """User and system time of the process and of those it waited for."""
    own_cpu_s: float
    """User and system time of the process alone."""
    peak_pss_bytes: int
    """Most memory of the process and its descendants at once; 0 when it was not sampled."""
    stdout: str


def run(
    command: Sequence[str], *, memory: bool = False, env: Mapping[str, str] | None = None, timeout_s: float = 3600
) -> Measured:
    """Run a command to its end; ``memory`` samples the proportional set size (PSS) of its process tree.

    ``env`` is added to this process's environment. Raises CommandError when the command fails or takes longer
    than ``timeout_s``. When time is up, or this process is interrupted, its whole tree is killed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | dict(env or {})
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment)
        watcher = _Watcher(process.pid, memory=memory, timeout_s=timeout_s)
        try:
            watcher.start()
            # The process stays a zombie, whose own times can still be read.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            wall_s = time.monotonic() - began
        except BaseException:
            _kill_tree(process.pid)
            raise
        finally:
            watcher.done.set()
            watcher.join()
            own_cpu_s = _own_cpu_s(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise CommandError(f"{' '.join(command)}: status {process.returncode}\n{_tail(out)}{_tail(err)}")
        out.seek(0)
        stdout = out.read().decode(errors="replace")
    return Measured(wall_s, usage.ru_utime + usage.ru_stime, own_cpu_s, watcher.peak_bytes, stdout)


def in_turn(
    sides: Mapping[str, Callable[[], float]], *, repeats: int, before: Callable[[], None], after: Callable[[], None]
) -> dict[str, list[float]]:
    """Run all sides in turn, ``repeats`` times; each side's figures, in the order of the rounds.

    ``before`` prepares the page cache ahead of every single run, ``after`` deletes what it wrote.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            before()
            try:
                figures[name].append(side())
            finally:
                after()
    return figures


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """``above / below``, round by round."""
    return [one / other for one, other in zip(above, below, strict=True)]


def median(figures: Iterable[float]) -> float:
    return statistics.median(figures)


def warm(paths: Iterable[Path]) -> None:
    """Read all files once."""
    buffer = bytearray(_READ_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def cold(paths: Iterable[Path]) -> None:
    """Take all files out of the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def best_state(nbytes: int) -> CacheState:
    """warm when files of so many bytes stay in memory beside the work; else cold, which is at least stable."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    return "warm" if nbytes <= _CACHE_SHARE * available else "cold"


class _Watcher(threading.Thread):
    """Samples the memory of a process tree until ``done`` is set, and kills the tree when its time is up."""

    def __init__(self, root: int, *, memory: bool, timeout_s: float) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.peak_bytes = 0
        self._tree = {root: _processes()[root].start}
        self._root = root
        self._memory = memory
        self._deadline = time.monotonic() + timeout_s

    def run(self) -> None:
        while not self.done.wait(_SAMPLE_S if self._memory else 0.5):
            if self._memory:
                self._follow()
                self.peak_bytes = max(self.peak_bytes, sum(map(_pss_bytes, self._tree)))
            if time.monotonic() > self._deadline:
                _kill_tree(self._root)

    def _follow(self) -> None:
        """Update the tree; whoever was in it stays, though its parent may have ended."""
        found = _processes()
        self._tree = {pid: start for pid, start in self._tree.items() if pid in found and found[pid].start == start}
        for pid in _descendants(self._tree, found):
            self._tree[pid] = found[pid].start


class _Process(NamedTuple):
    parent: int
    start: int
    """In ticks since the machine's start: tells a process from a later one with its number."""


def _processes() -> dict[int, _Process]:
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            found[int(entry.name)] = _Process(int(fields[1]), int(fields[19]))
    return found


def _descendants(roots: Iterable[int], found: Mapping[int, _Process]) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, process in found.items():
        children.setdefault(process.parent, []).append(pid)
    result: list[int] = []
    queue = list(roots)
    while queue:
        more = children.get(queue.pop(), [])
        result += more
        queue += more
    return result


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third, the state, on; None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _own_cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it ended
    return 0


def _kill_tree(root: int) -> None:
    for pid in [root, *_descendants([root], _processes())]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _tail(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
    return file.read().decode(errors="replace")
