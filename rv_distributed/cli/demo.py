"""``rv demo``: all three operations on small checkpoints that it makes."""

from __future__ import annotations

import json as jsonlib
import tempfile
import time
from typing import TYPE_CHECKING, Annotated

import typer

from rv_distributed.cli.options import Json
from rv_distributed.cli.terminal import say
from rv_distributed.errors import OutputError, RunError
from rv_distributed.units import show_bytes, show_count, show_seconds

if TYPE_CHECKING:
    from rv_distributed.demo import Demo


def demo(
    out: Annotated[
        str | None, typer.Option("--out", help="Folder to work in; the default is a new temporary one.", metavar="PATH")
    ] = None,
    json: Json = False,
) -> None:
    """Make three small checkpoints, then extract, apply, transfer and verify.

    \b
    Example:
      rv demo --out rv-demo
    """
    from rv_distributed.demo import run_demo

    began = time.monotonic()
    folder = out or tempfile.mkdtemp(prefix="rv-demo-")
    try:
        made = run_demo(folder)
    except FileExistsError as error:
        raise OutputError(f"{error.filename} already exists. Give another --out.") from None
    if not json:
        _show(made, folder, time.monotonic() - began)
    if not made.same_bytes:
        raise RunError("extract and apply gave other bytes than transfer")
    if json:
        document = {"schema_version": 1, "status": "done", "path": folder, "same_bytes": made.same_bytes}
        say(jsonlib.dumps(document, indent=2))


def _show(made: Demo, folder: str, seconds: float) -> None:
    from rv_distributed.demo import ALPHA

    totals = made.vector.totals
    changed = made.applied.totals.changed_elements
    same = "the same bytes" if made.same_bytes else "DIFFERENT BYTES"
    lines = [
        f"made      target, reference and donor: Qwen2.5-shaped, {show_count(totals.parameters)} parameters each",
        f"extracted vector = donor − reference: {show_bytes(totals.data_bytes)} in float32, "
        f"{totals.changed_elements / totals.parameters:.1%} of it not zero",
        f"applied   applied = target + {ALPHA}·vector: {changed / totals.parameters:.1%} of the elements changed",
        f"transfer  transferred = target + {ALPHA}·(donor − reference), in one pass",
        "verified  every byte of all three outputs, against their manifests",
        f"compared  applied and transferred: {same}",
        "",
        f"All of it lies in {folder}, done in {show_seconds(seconds)}. Look at it with",
        f"  rv inspect {folder}/transferred",
    ]
    say("\n".join(lines))
