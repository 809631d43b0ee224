"""What can happen to a run, or to what it left before the next one."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from faults.harness import STEPS, Fault, damage, staged

#: Statuses of runs that failed, or were refused, in an orderly way.
FAILED = (1, 2)
SIGNALS = {signal.SIGKILL: ("kill", -9), signal.SIGTERM: ("term", 143), signal.SIGINT: ("int", 130)}


class Trouble(NamedTuple):
    """Something that happens while a run goes on."""

    kind: str
    statuses: tuple[int, ...]
    """With which the run may end, beside 0."""
    faults: tuple[Fault, ...] = ()
    signum: signal.Signals | None = None
    """Sent to it after ``after_s``."""
    after_s: float = 0.0


def random_trouble(choose: random.Random, place: Path, calm_s: float) -> Trouble:
    """``calm_s`` is how long a run takes that is left alone."""
    where, nth = f"{place}/", choose.randint(1, choose.choice((10, 30, 90)))
    signum = choose.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    action, status = SIGNALS[signum]
    match choose.randrange(8):
        case 0 | 1:
            fault = Fault(choose.choice((STEPS, "mkdir|rename|exchange|unlink|fsync", "write")), where, nth, action)
            return Trouble(f"{signum.name} at a system call", (status,), (fault,))
        case 2 | 3:
            # A signal that comes before rv listens to it ends it as it does any process.
            return Trouble(
                f"{signum.name} at a moment",
                (status, -int(signum)),
                signum=signum,
                after_s=choose.uniform(0, 1.1 * calm_s),
            )
        case 4:
            action = choose.choice(("ENOSPC", "EDQUOT"))
            onwards = choose.choice(("", "+"))
            fault = Fault("write|fallocate|mkdir|open", where, f"{nth}{onwards}", action)
            return Trouble("no room (ENOSPC, EDQUOT)", FAILED, (fault,))
        case 5:
            return Trouble("EIO on write, fsync or rename", FAILED, (Fault(STEPS, where, nth, "EIO"),))
        case 6:
            return Trouble("EIO on read", FAILED, (Fault("read", f"{place.parent}/", nth, "EIO"),))
        case _:
            short = Fault("read|write", f"{place.parent}/", "~2", "short")
            again = Fault("open|fsync|truncate|read|write", f"{place.parent}/", "~4", "EINTR")
            return Trouble("short counts and EINTR", (), (again, short))


def harm_what_is_staged(choose: random.Random, outs: Sequence[Path]) -> str | None:
    """Damage records or shards of unfinished outputs; says which, if there are any."""
    records = [staged(out) / "records.jsonl" for out in outs]
    shards = [path for out in outs for path in staged(out).glob("output-*/*.safetensors")]
    kind, files = choose.choice((("damaged records", records), ("damaged shards", shards)))
    files = [file for file in files if file.exists() and file.stat().st_size]
    for file in sorted(files, key=str)[: choose.randint(1, 2)]:
        damage(file, choose)
    return kind if files else None


def tear_the_plan(choose: random.Random, outs: Sequence[Path]) -> bool:
    """Cut off a ``plan.json``, if there is one."""
    plans = [path for out in outs if (path := staged(out) / "plan.json").exists()]
    for path in plans[:1]:
        content = path.read_bytes()
        path.write_bytes(content[: choose.randrange(len(content))])
    return bool(plans)
