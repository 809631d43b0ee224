"""``rv verify``: is an output still what was written?"""

from __future__ import annotations

import json as jsonlib
import time
from typing import Annotated

import typer

from rv_distributed.cli import options as opt
from rv_distributed.cli.terminal import say
from rv_distributed.cli.units import show_bytes, show_seconds
from rv_distributed.errors import one_line


def verify(
    out: Annotated[str, typer.Argument(help="Folder of an output.", metavar="OUT")],
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Read an output again and compare every byte with its manifest.

    Exit status 3 when anything differs; each difference is named with its tensor and byte range.

    \b
    Example:
      rv verify out
    """
    from rv_distributed.verification import verify as verify_output

    began = time.monotonic()
    manifest = verify_output(out)
    seconds = time.monotonic() - began
    nbytes = sum(shard.bytes for shard in manifest.shards) + sum(file.bytes for file in manifest.files)
    if json:
        say(jsonlib.dumps({"schema_version": 1, "status": "verified", "path": out, "bytes": nbytes}, indent=2))
    elif not quiet:
        files = len(manifest.shards) + len(manifest.files)
        say(f"{one_line(out)}: {files} files, {show_bytes(nbytes)}, all as written ({show_seconds(seconds)})")
