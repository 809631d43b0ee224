"""``python tests/benchmarks``: prepare the data, run our peers and us in turn, print the table.

The table and every single figure also go to ``results.json`` and ``results.md`` in the work folder, where the
data stays for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from rows import Row, rows_of
from suite import Bench, Figure, Goal, SizeName, size_of


def main() -> None:
    """Measure the rows that are asked for."""
    given = _arguments()
    work = given.work.absolute()
    mergekit = given.mergekit or work / "mergekit"
    size = size_of(given.size, given.repeats)
    bench = Bench(work, size, mergekit, check=given.check or given.size == "toy")
    rows = _chosen(list(rows_of(bench)), given.only)
    bench.clear()
    figures: list[Figure] = []
    for number, row in enumerate(rows):
        print(f"{row.name} …", file=sys.stderr, flush=True)
        figures += row.measure()
        print(f"  {'; '.join(_value(figure) for figure in figures if figure.row == row.name)}", file=sys.stderr)
        if given.lean:
            kept = {shape.name for later in rows[number + 1 :] for shape in later.needs}
            for shape in row.needs:
                if shape.name not in kept:
                    shutil.rmtree(work / "data" / shape.name, ignore_errors=True)
    figures += _spread(figures)
    text = table(figures)
    (work / "results.md").write_text(text)
    (work / "results.json").write_text(json.dumps(document(bench, figures), indent=2, ensure_ascii=False) + "\n")
    print(text, end="")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("--size", choices=get_args(SizeName), default="quick")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="where data and results lie")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows, or the beginnings of their names")
    parser.add_argument("--repeats", type=int, help="rounds of each comparison; 1, 3 and 5 in the three sizes")
    parser.add_argument("--check", action="store_true", help="verify every output of ours; toy suites always do")
    parser.add_argument("--lean", action="store_true", help="delete data once no later row needs it")
    existing = os.environ.get("RV_BENCH_MERGEKIT")
    parser.add_argument(
        "--mergekit",
        type=Path,
        default=Path(existing) if existing else None,
        help="virtual environment that has mergekit, or gets it (RV_BENCH_MERGEKIT; the default is WORK/mergekit)",
    )
    return parser.parse_args()


def _chosen(rows: list[Row], only: Sequence[str]) -> list[Row]:
    unknown = [name for name in only if not any(row.name.startswith(name) for row in rows)]
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}; there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if not only or row.name.startswith(tuple(only))]


def _spread(figures: Iterable[Figure]) -> list[Figure]:
    """Whether peak memory is the same for all inputs."""
    peaks = {f.row.removeprefix("memory-"): f.value for f in figures if f.row.startswith("memory-") and f.goal}
    if len(peaks) < 2:
        return []
    value = max(peaks.values()) / min(peaks.values())
    detail = ", ".join(f"{name} {peak:.0f} MB" for name, peak in peaks.items())
    raw = {name: [peak] for name, peak in peaks.items()}
    return [Figure("memory", "peak memory, largest over smallest", value, "×", Goal("≤", 1.05, "×"), detail, raw)]


def _value(figure: Figure) -> str:
    return f"{figure.value:.3g} {figure.unit}" if figure.value < 1000 else f"{figure.value:.0f} {figure.unit}"


def table(figures: Iterable[Figure]) -> str:
    """The figures as a Markdown table."""
    lines = ["| figure | goal | measured | reached | detail |", "| --- | --- | --- | --- | --- |"]
    for figure in figures:
        goal, reached = "", ""
        if figure.goal is not None:
            goal = f"{figure.goal.relation} {figure.goal.limit:g} {figure.goal.unit}"
            reached = "yes" if figure.goal.holds(figure.value) else "no"
        lines.append(f"| {figure.what} | {goal} | {_value(figure)} | {reached} | {figure.detail} |")
    return "\n".join(lines) + "\n"


def document(bench: Bench, figures: Iterable[Figure]) -> dict[str, object]:
    """Everything measured, and on what, as JSON values."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "size": bench.size.name,
        "repeats": bench.size.repeats,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("rv-distributed", "torch", "ray", "blake3")},
        "verified": bench.verified,
        "figures": [
            asdict(figure) | {"goal": figure.goal._asdict() if figure.goal else None, "reached": _reached(figure)}
            for figure in figures
        ],
    }


def _reached(figure: Figure) -> bool | None:
    return figure.goal.holds(figure.value) if figure.goal else None


if __name__ == "__main__":
    main()
