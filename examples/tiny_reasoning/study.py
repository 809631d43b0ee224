"""Several seeds, and what they say together: a table in Markdown and a figure of accuracy over alpha.

    python examples/tiny_reasoning/study.py --seeds 11 12 13 14 15 --out tiny-reasoning-study

Seeds that are finished are kept, so that the same command goes on with the others, and adds new ones.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from figure import Series, figure
from run import ALPHAS, NOT_LEARNED, PERTURBATIONS

CONDITIONS: Final = (None, *PERTURBATIONS)


class Answer(NamedTuple):
    """Of one model to one problem."""

    score: float
    written: float
    """Share of the problem's steps that the solution writes."""


Key = tuple[str, float, str | None]
"""An evaluation's folder, alpha, and the perturbation."""
Answers = Mapping[Key, Sequence[Answer]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15])
    parser.add_argument("--out", type=Path, default=Path("tiny-reasoning-study"))
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time, of one processor each")
    parser.add_argument("--problems", type=int, default=512, help="held-out problems of the evaluation")
    parser.add_argument("--toy", action="store_true", help="train next to nothing, to see that everything runs")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    reasons: list[str] = []
    with ThreadPoolExecutor(given.jobs) as pool:
        run = partial(run_seed, out=given.out, problems=given.problems, toy=given.toy)
        for why in pool.map(run, given.seeds):
            reasons.append(why)
            # After every seed, so that a study that is cut short has what it measured.
            text = write(given.out, dict(zip(given.seeds, reasons, strict=False)))
    print(text)
    return 1 if all(reasons) else 0


def write(out: Path, reasons: Mapping[int, str]) -> str:
    """Write the tables and the figure, and return the tables. Of every seed, why it failed, if it did."""
    kept = [seed for seed, why in reasons.items() if not why]
    lost = [f"seed {seed}: {why}" for seed, why in reasons.items() if why]
    answers = [read_seed(out / f"seed{seed}") for seed in kept]
    text = report(answers, kept, lost)
    (out / "README.md").write_text(text, encoding="utf-8")
    if answers:
        (out / "accuracy.svg").write_text(draw(answers), encoding="utf-8")
    return text


def run_seed(seed: int, *, out: Path, problems: int, toy: bool) -> str:
    """Run a seed that is not finished; why it failed, if it did."""
    folder, known = out / f"seed{seed}", out / f"seed{seed}.not-learned"
    if (folder / "report.html").exists():
        return ""
    if known.exists():
        return known.read_text(encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    script = str(Path(__file__).with_name("run.py"))
    command = [sys.executable, script, "--seed", str(seed), "--out", str(folder), "--problems", str(problems)]
    command += ["--toy"] if toy else []
    with open(out / f"seed{seed}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    if done.returncode == NOT_LEARNED:
        why = (out / f"seed{seed}.log").read_text(encoding="utf-8").splitlines()[-1].partition(": ")[2]
        known.write_text(why, encoding="utf-8")
        return why
    return f"exit status {done.returncode}, see {log.name}" if done.returncode else ""


def read_seed(folder: Path) -> Answers:
    """Every answer of every model."""
    import pyarrow.parquet as pq

    found: dict[Key, list[Answer]] = {}
    for name in ("eval", "eval-random", "eval-full"):
        for row in pq.read_table(folder / name / "rv_items.parquet").to_pylist():
            steps = row["prompt"].count("+")
            answer = Answer(row["score"], row["response"].count("=") / steps)
            found.setdefault((name, row["alpha"], row["perturbation"]), []).append(answer)
    return found


MODELS: Final[tuple[tuple[str, str, float], ...]] = (
    ("target", "eval", 0.0),
    *((f"target + {'' if alpha == 1.0 else f'{alpha:g}·'}v", "eval", alpha) for alpha in ALPHAS),
    ("target − v", "eval", -1.0),
    ("target + random vector of v's norms", "eval-random", 1.0),
    ("target + (SFT-full − SFT-terse)", "eval-full", 1.0),
)


def report(seeds: Sequence[Answers], kept: Sequence[int], lost: Sequence[str]) -> str:
    """The tables, as Markdown."""
    count = f"{len(kept)} seed{'s' if len(kept) > 1 else ''} ({', '.join(map(str, kept))}), {len(lost)} failed"
    lines = [f"{count}{': ' if lost else ''}{'; '.join(lost)}. Mean ± standard error over the seeds.", ""]
    if not seeds:
        return "\n".join(lines)
    problems = len(next(iter(seeds[0].values())))
    lines += [*_table(f"accuracy on {problems} problems", seeds, "score"), ""]
    lines += _table("share of the steps written", seeds, "written")
    gain = show([mean(own, ("eval", 1.0, None)) - mean(own, ("eval", 0.0, None)) for own in seeds])
    beyond = show([mean(own, ("eval", 1.0, None)) - mean(own, ("eval-full", 1.0, None)) for own in seeds])
    lines += ["", f"What v adds to the target: {gain}; beyond what SFT-full − SFT-terse adds: {beyond}.", ""]
    shown = [(model, (name, alpha, None)) for model, name, alpha in MODELS if abs(alpha) in (0.0, 1.0)]
    lines += [f"| accuracy, clean | {' | '.join(model for model, _ in shown)} |", f"| --- |{' ---: |' * len(shown)}"]
    for seed, own in zip(kept, seeds, strict=True):
        lines.append(f"| seed {seed} | {' | '.join(f'{mean(own, key):.3f}' for _, key in shown)} |")
    return "\n".join([*lines, ""])


def _table(title: str, seeds: Sequence[Answers], what: str) -> list[str]:
    heads = [condition or "clean" for condition in CONDITIONS]
    lines = [f"| {title} | {' | '.join(heads)} |", f"| --- |{' ---: |' * len(heads)}"]
    for model, name, alpha in MODELS:
        keys = [(name, alpha, condition) for condition in CONDITIONS]
        cells = [show([mean(own, key, what) for own in seeds]) for key in keys]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def mean(answers: Answers, key: Key, what: str = "score") -> float:
    own = answers[key]
    return sum(float(getattr(answer, what)) for answer in own) / len(own)


def show(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    middle, error = spread(values)
    return f"{middle:.2f}" if error is None else f"{middle:.2f} ± {error:.2f}"


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error where there are several."""
    middle = sum(values) / len(values)
    if len(values) < 2:
        return middle, None
    variance = sum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return middle, math.sqrt(variance / len(values))


def draw(seeds: Sequence[Answers]) -> str:
    """Accuracy over alpha, with a line for each condition."""
    series = []
    for condition in CONDITIONS:
        at = {alpha: spread([mean(own, ("eval", alpha, condition)) for own in seeds]) for alpha in (-1.0, 0.0, *ALPHAS)}
        points = [(alpha, middle, error or 0.0) for alpha, (middle, error) in at.items()]
        series.append(Series(condition or "clean", points))
    return figure(series, x="alpha", y="accuracy")


if __name__ == "__main__":
    sys.exit(main())
