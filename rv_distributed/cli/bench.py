"""``rv bench``: what a storage can do, and how long a plan would take on it."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import Annotated, Any

import typer

from rv_distributed.cli.options import Json
from rv_distributed.cli.terminal import say, warn
from rv_distributed.errors import UsageError
from rv_distributed.units import parse_bytes, show_bytes, show_seconds

Folder = Annotated[str, typer.Argument(help="Folder on the storage to measure.", metavar="PATH")]
Size = Annotated[str, typer.Option(help="How much to write there, twice, while measuring.", metavar="SIZE")]
PlanFile = Annotated[
    str | None, typer.Option("--plan", help="What --dry-run --json printed: predict its time.", metavar="FILE")
]


def bench(path: Folder, size: Size = "1GiB", plan: PlanFile = None, json: Json = False) -> None:
    """Measure reading and writing at PATH the way that runs do it; later runs compare themselves with it.

    \b
    Examples:
      rv bench /models
      rv transfer … --dry-run --json > plan.json && rv bench /models --plan plan.json
    """
    from rv_distributed.bench import LEAST_KEPT_BYTES, measure_storage

    moved = _moved(plan) if plan is not None else None
    nbytes = parse_bytes(size, "--size")
    speed = measure_storage(path, nbytes)
    if nbytes < LEAST_KEPT_BYTES:
        least = f"{LEAST_KEPT_BYTES >> 20}MiB"
        warn(f"warning: --size {size} is too little to go by, so these figures are not kept; give {least} or more")
    predicted = speed.predict_s(*moved) if moved is not None else None
    if json:
        document = {"schema_version": 1, "status": "measured", "path": path, "bytes_per_s": asdict(speed)}
        say(jsonlib.dumps({**document, "predicted_s": predicted}, indent=2))
        return
    rows = [
        ("write", speed.write, "flushed to the device"),
        ("read", speed.read, "not in the page cache"),
        ("read again", speed.cached_read, "from the page cache"),
        ("both", speed.mixed, "in all, reading three bytes for one written"),
    ]
    say("\n".join(f"{label:>10}  {show_bytes(rate) + '/s':<11} {note}" for label, rate, note in rows))
    if predicted is not None:
        say(f"{'the plan':>10}  {show_seconds(predicted)} with inputs that are not in the page cache")


def _moved(path: str) -> tuple[int, int]:
    """Bytes read and written by the plan in a file."""
    try:
        with open(path, encoding="utf-8") as file:
            plan: dict[str, Any] = jsonlib.load(file)["plan"]
        return int(plan["bytes_read"]), int(plan["bytes_written"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--plan: {path} does not hold what --dry-run --json prints ({error})") from None
