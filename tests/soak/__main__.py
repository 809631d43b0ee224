"""``make soak``: random jobs under random faults, for some minutes; a line a minute, and a table at the end."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from faults.harness import Zygote, build_shim, why_no_shim

from soak.rounds import Tally, play


def soak(minutes: float, seed: int, *, most_rounds: int | None = None) -> int:
    """Play rounds; the exit status. A round's seed is ``seed`` and its number, so that it can be played first."""
    if why := why_no_shim():
        print(f"soak: {why}", file=sys.stderr)
        return 2
    began, told, tally = time.monotonic(), 0, Tally()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    root = folder / "root"
    root.mkdir()
    print(f"seed {seed}, {minutes:g} minutes", flush=True)
    with Zygote(build_shim(folder), root) as zygote:
        while (passed := time.monotonic() - began) < 60 * minutes and tally.rounds != most_rounds:
            if passed // 60 > told:
                told = int(passed // 60)
                print(f"{told:4} min  {_totals(tally)}", flush=True)
            place = Path(tempfile.mkdtemp(dir=root))
            try:
                play(seed, place, zygote, tally)
            except (AssertionError, OSError, ValueError) as error:
                print(
                    f"{error!r}\n\nLOST. make soak SEED={seed} begins with this round; its files: {place}", flush=True
                )
                break
            shutil.rmtree(place)
            seed += 1
        else:
            shutil.rmtree(folder)
            print(table(tally, time.monotonic() - began), flush=True)
            return 0
    print(table(tally, time.monotonic() - began), flush=True)
    return 1


def _totals(tally: Tally) -> str:
    return (
        f"{tally.rounds} checkpoints, {tally.runs} runs, {tally.came_true.total()} faults, "
        f"{tally.pieces_kept} pieces kept in {tally.resumed} resumed runs, {tally.bytes_lost} bytes lost"
    )


def table(tally: Tally, seconds: float) -> str:
    """What happened, in Markdown."""
    lines = ["", "| fault | times | runs that failed of it |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {tally.came_true[kind]} | {tally.stopped[kind]} |" for kind in sorted(+tally.came_true)]
    lines += ["", f"{_totals(tally)}; {tally.bytes_compared} bytes compared;"]
    lines += [f"{tally.looks} looks at outputs while runs went on; {seconds / 60:.1f} minutes"]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, help="of the first round; the default is another one each time")
    given = parser.parse_args()
    start = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    sys.exit(soak(given.minutes, start))
