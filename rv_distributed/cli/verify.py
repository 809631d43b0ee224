"""``rv verify``: is an output still what was written?"""

from __future__ import annotations

import json as jsonlib
import time
from typing import Annotated

import typer

from rv_distributed.cli import options as opt
from rv_distributed.cli.terminal import say
from rv_distributed.errors import UsageError, one_line
from rv_distributed.units import show_bytes, show_seconds


def verify(
    out: Annotated[str, typer.Argument(help="Folder or URI of an output.", metavar="OUT")],
    against_inputs: Annotated[
        bool, typer.Option("--against-inputs", help="Then compute it again from its inputs, and compare every bit.")
    ] = False,
    sample: Annotated[
        float | None,
        typer.Option(help="With --against-inputs: compute only this share of it, spread out.", metavar="SHARE"),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read an output again and compare every byte with its manifest.

    Exit status 3 when anything differs; each difference is named with its tensor and byte range.

    \b
    Example:
      rv verify out
      rv verify out --against-inputs --sample 0.05
    """
    from rv_distributed.verification import verify as verify_output
    from rv_distributed.verification import verify_against_inputs

    if sample is not None and not against_inputs:
        raise UsageError("--sample goes with --against-inputs")
    began = time.monotonic()
    manifest = verify_output(out)
    seconds = time.monotonic() - began
    nbytes = sum(shard.bytes for shard in manifest.shards) + sum(file.bytes for file in manifest.files)
    recomputed = verify_against_inputs(out, sample=1.0 if sample is None else sample) if against_inputs else None
    recomputed_s = time.monotonic() - began - seconds
    if json:
        document = {"schema_version": 1, "status": "verified", "path": out, "bytes": nbytes}
        if recomputed is not None:
            document["recomputed"] = {
                "bytes": recomputed.bytes,
                "pieces": recomputed.pieces,
                "pieces_total": recomputed.pieces_total,
            }
        say(jsonlib.dumps(document, indent=2))
    elif not quiet:
        files = len(manifest.shards) + len(manifest.files)
        say(f"{one_line(out)}: {files} files, {show_bytes(nbytes)}, all as written ({show_seconds(seconds)})")
        if recomputed is not None:
            say(
                f"{recomputed.pieces} of {recomputed.pieces_total} pieces, {show_bytes(recomputed.bytes)}, "
                f"computed again from the inputs: the same bits ({show_seconds(recomputed_s)})"
            )
