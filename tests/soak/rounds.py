"""One round: a random job, disturbed again and again until it comes through, and held against an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from faults.harness import Done, Fault, Zygote, content_of, lost_bytes, staged
from reference import assert_same, read_checkpoint

from soak.models import Job, random_job
from soak.troubles import FAILED, Trouble, harm_what_is_staged, random_trouble, tear_the_plan

Content = Mapping[str, bytes]


@dataclass
class Tally:
    """What all rounds did."""

    rounds: int = 0
    runs: int = 0
    resumed: int = 0
    """Runs that kept pieces of the ones before."""
    pieces_kept: int = 0
    looks: int = 0
    """At the outputs, while runs went on, that found one there."""
    bytes_compared: int = 0
    bytes_lost: int = 0
    came_true: Counter[str] = field(default_factory=Counter)
    """Runs, or times between two runs, by what happened to them."""
    stopped: Counter[str] = field(default_factory=Counter)
    """Those runs that failed."""


class Lost(AssertionError):
    """A round ended with something else than what it had to."""


class Watch:
    """Looks at the outputs' names all the time. A context manager; raises Lost at its end."""

    def __init__(self, outs: list[Path], allowed: list[list[Content]]) -> None:
        self._outs = outs
        self._sizes = [[_sizes(content) for content in contents] for contents in allowed]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._torn: list[str] = []
        self.looks = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._torn and not any(error):
            raise Lost(f"half an output was visible: {self._torn[0]}")

    def _look(self) -> None:
        while not self._ended.wait(0.003):
            for out, allowed in zip(self._outs, self._sizes, strict=True):
                with suppress(FileNotFoundError):
                    before = out.stat().st_ino
                    found = {str(path.relative_to(out)): path.stat().st_size for path in _files(out)}
                    if out.stat().st_ino != before:
                        continue  # replaced meanwhile, and deleted
                    self.looks += 1
                    timed = [found.pop(name, None) for name in ("rv_manifest.json", "rv_pieces.parquet")]
                    if None in timed or found not in allowed:
                        self._torn.append(f"{out}: {found}")


def _files(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.is_file()]


def _sizes(content: Content) -> dict[str, int]:
    return {name: len(data) for name, data in content.items() if name != "rv_manifest.json"}


def play(seed: int, folder: Path, zygote: Zygote, tally: Tally) -> None:
    """Play the round of ``seed`` in ``folder``, which is below the zygote's. Raises Lost."""
    _Round(random.Random(f"soak {seed}"), folder, zygote, tally).play()  # noqa: S311


class _Round:
    def __init__(self, choose: random.Random, folder: Path, zygote: Zygote, tally: Tally) -> None:
        self._choose, self._zygote, self._tally = choose, zygote, tally
        self._job: Job = random_job(choose, folder / "inputs")
        self._calm, self._place = folder / "calm", folder / "place"
        self._calm.mkdir()
        self._place.mkdir()
        self._outs = self._job.outs(self._place)
        self._more: list[str] = []

    def play(self) -> None:
        began = time.monotonic()
        self._undisturbed(self._job.to(self._calm))
        calm_s = time.monotonic() - began
        calm = self._job.outs(self._calm)
        for out, tensors in zip(calm, self._job.wanted.values(), strict=True):
            assert_same(read_checkpoint(out), tensors)
        self._wanted: list[Content] = [content_of(out) for out in calm]
        self._older: list[Content] = []
        if self._choose.random() < 0.4:
            self._more = ["--overwrite"]
            self._undisturbed(self._job.to(self._place, *self._job.older))
            self._older = [content_of(out) for out in self._outs]
        for _ in range(self._choose.randint(1, 8)):
            if self._disturbed(random_trouble(self._choose, self._place, calm_s)):
                break
            self._harm()
        else:
            self._undisturbed(self._job.to(self._place, *self._more))
        if any(staged(out).exists() for out in self._outs):
            # A run that came through met a fault while it cleaned up; the next one does it.
            self._undisturbed(self._job.to(self._place, *self._more))
        for out, wanted in zip(self._outs, self._wanted, strict=True):
            lost = lost_bytes(content_of(out), wanted)
            self._tally.bytes_compared += sum(map(len, wanted.values()))
            self._tally.bytes_lost += lost
            self._check(not lost, f"{lost} bytes of {out} are lost")
            self._check(not staged(out).exists(), f"{staged(out)} was left")
            checks = ["--against-inputs"] if self._choose.random() < 0.2 else []
            done = self._run(["verify", out, *checks])
            self._check(done.status == 0, f"verify: {done}")
        self._tally.rounds += 1

    def _disturbed(self, trouble: Trouble) -> bool:
        """Whether the run came through."""
        exchanges = self._choose.random() < 0.8
        faults = trouble.faults if exchanges else (*trouble.faults, Fault("exchange", "/", "1+", "EINVAL"))
        with Watch(self._outs, self._allowed()) as watch:
            done = self._run(self._job.to(self._place, *self._more), faults, trouble)
        self._tally.looks += watch.looks
        hits = {kind for kind in done.hits if "EINVAL" not in kind}
        self._tally.came_true[trouble.kind] += bool(hits)
        self._tally.came_true["no exchange of names"] += len(hits) < len(done.hits)
        self._tally.stopped[trouble.kind] += done.status != 0
        self._check(done.status in (0, *trouble.statuses), f"{trouble} ended as {done}")
        self._check("Traceback" not in done.stderr, f"{trouble} ended as {done}")
        for number, (out, allowed) in enumerate(zip(self._outs, self._allowed(), strict=True)):
            if out.exists():
                self._check(content_of(out) in allowed, f"{out} is neither the new output nor the older one")
            elif self._older:
                older = content_of(staged(out) / "replaced")
                self._check(not exchanges and older == self._older[number], f"the older {out} is gone")
        return done.status == 0

    def _allowed(self) -> list[list[Content]]:
        older = [[content] for content in self._older] or [[] for _ in self._outs]
        return [[wanted, *others] for wanted, others in zip(self._wanted, older, strict=True)]

    def _harm(self) -> None:
        unmade = [o for o, w in zip(self._outs, self._wanted, strict=True) if not o.exists() or content_of(o) != w]
        match self._choose.randrange(8):
            case 0 | 1 | 2 if kind := harm_what_is_staged(self._choose, unmade):
                self._tally.came_true[kind] += 1
            case 3 if tear_the_plan(self._choose, unmade):
                self._tally.came_true["torn plan.json"] += 1
                self._tally.stopped["torn plan.json"] += 1
                done = self._run(self._job.to(self._place, *self._more))
                self._check(done.status in FAILED and "--restart" in done.stderr, f"a torn plan: {done}")
                # Once it has a new plan, it is stopped again.
                fault = Fault("write", ".safetensors", self._choose.randint(1, 10), "kill")
                self._run(self._job.to(self._place, *self._more, "--restart"), (fault,))

    def _undisturbed(self, command: list[str | Path]) -> None:
        done = self._run(command)
        self._check(done.status == 0, f"an undisturbed run: {done}")

    def _run(self, command: list[str | Path], faults: tuple[Fault, ...] = (), trouble: Trouble | None = None) -> Done:
        pid = self._zygote.begin(*command, faults=faults, seed=self._choose.getrandbits(30))
        timers, sent = [], list[str]()
        if trouble is not None and trouble.signum is not None:
            timers.append(threading.Timer(trouble.after_s, _send, (pid, trouble.signum, sent)))
            timers[0].start()
        done = self._zygote.end()
        for timer in timers:
            timer.cancel()
            timer.join()
        done.hits.update(sent)
        self._tally.runs += 1
        if kept := re.search(r"^(\d+) of \d+ pieces kept", done.stdout, re.MULTILINE):
            self._tally.resumed += 1
            self._tally.pieces_kept += int(kept[1])
        return done

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise Lost(f"{what}\nof {' '.join(map(str, self._job.to(self._place, *self._more)))}")


def _send(pid: int, signum: signal.Signals, sent: list[str]) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)
        sent.append(signum.name)
