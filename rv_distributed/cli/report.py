"""``rv report``: what an output's tables say, to look at."""

from __future__ import annotations

import json as jsonlib
import os
from typing import Annotated, Literal

import typer

from rv_distributed.checkpoint.manifest import MANIFEST_FILE
from rv_distributed.checkpoint.uris import is_remote, last_part
from rv_distributed.cli.options import Json
from rv_distributed.cli.terminal import say
from rv_distributed.errors import OutputError, RunError, UsageError, one_line
from rv_distributed.storage.publish import write_durably


def report(
    outs: Annotated[
        list[str] | None,
        typer.Argument(help="Folder of an output, or its URI; several are compared.", metavar="[OUT...]"),
    ] = None,
    form: Annotated[
        Literal["html", "md"], typer.Option("--format", help="html: one page with figures; md: tables.")
    ] = "html",
    out: Annotated[
        str | None,
        typer.Option(help="File to write, or - for stdout; NAME.report.html here if not given.", metavar="FILE"),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option("--eval", help="Folder of an rv eval; its results come first.", metavar="PATH")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    json: Json = False,
) -> None:
    """Report what an output is and what was realised of the vector, in one page that needs no network.

    \b
    Examples:
      rv report out
      rv report out-0.5 out-0.7 out-1.0 --out sweep.html
      rv report out --eval eval
    """
    from rv_distributed.report import report as make_report

    outs = outs or []
    named = outs if outs or evaluation is None else [evaluation]
    name = "comparison"
    if len(named) == 1:
        name = last_part(named[0] if is_remote(named[0]) else os.path.abspath(named[0]))
    path = out if out is not None else f"{name}.report.{form}"
    if path == "-" and json:
        raise UsageError("--json and --out - would both write to stdout; name a file")
    if path != "-":
        _check_place(path, outs, overwrite=overwrite)
    text = make_report(outs, form, evaluation=evaluation)
    if path == "-":
        say(text.rstrip("\n"))
        return
    try:
        write_durably(path, text.encode())
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    path = os.path.abspath(path)
    document = {"schema_version": 1, "status": "written", "path": path}
    say(jsonlib.dumps(document, indent=2) if json else one_line(path))


def _check_place(path: str, outs: list[str], *, overwrite: bool) -> None:
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    for out in map(os.path.realpath, outs):
        if os.path.commonpath([folder, out]) == out:
            raise UsageError(
                f"--out {path} lies in {out}, where rv verify would find a file too many; name another place"
            )
    if os.path.lexists(os.path.join(folder, MANIFEST_FILE)):
        raise UsageError(f"--out {path} lies in another output, {folder}. Name another place.")
    if not os.path.isdir(folder):
        raise UsageError(f"--out {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise UsageError(f"--out {path} is a folder; give a file")
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} already exists. Give another --out, or --overwrite to replace it.")
