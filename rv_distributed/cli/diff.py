"""``rv diff``: what changed between two checkpoints."""

from __future__ import annotations

import json as jsonlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from rv_distributed.cli.options import Json, Quiet
from rv_distributed.cli.terminal import say
from rv_distributed.errors import OutputError, RunError, one_line
from rv_distributed.units import plural, show_count

if TYPE_CHECKING:
    from rv_distributed.comparison import Diff, Sums

_MOST_TENSORS: Final = 10
_MOST_NAMES: Final = 5
_HEAD: Final = ("", "‖A−B‖", "‖A−B‖/‖B‖", "cosine", "differ", "max |A−B|")
_DIFFERENT: Final = 3


def diff(
    a: Annotated[str, typer.Argument(help="Checkpoint to look at: folder, URI or name on the Hub.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Checkpoint to compare it with.", metavar="B")],
    parquet: Annotated[
        str | None, typer.Option(help="File to write with a row for every tensor.", metavar="FILE")
    ] = None,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 3 when anything differs, as verify does.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what changed between two checkpoints, by layer and tensor. Both are read once; nothing is written.

    Tensors are compared by name. Those that only one has, and those of other shapes, are listed.

    \b
    Examples:
      rv diff out instruct
      rv diff grpo sft --parquet changes.parquet
      rv diff out reference-output --exit-code --quiet
    """
    from rv_distributed.cli.progress import bytes_display
    from rv_distributed.comparison import diff as compare

    if parquet is not None and os.path.lexists(parquet) and not overwrite:
        raise OutputError(f"{parquet} already exists. Give another --parquet, or --overwrite to replace it.")
    with bytes_display("compared", shown=not quiet) as progress:
        found = compare(a, b, progress=progress)
    if parquet is not None:
        _write(found, parquet)
    if json:
        say(jsonlib.dumps(_document(found), indent=2))
    elif not quiet:
        say("\n".join(_text(found)))
    if exit_code and not found.is_same:
        raise typer.Exit(_DIFFERENT)


def _write(found: Diff, path: str) -> None:
    from rv_distributed.comparison.table import write_diff
    from rv_distributed.storage.publish import write_durably

    try:
        write_durably(path, write_diff(found))
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def _document(found: Diff) -> dict[str, Any]:
    from rv_distributed.comparison.table import measures_of, row_of

    return {
        "schema_version": 1,
        "status": "compared",
        "a": found.a,
        "b": found.b,
        "same": found.is_same,
        "total": {"tensors": len(found.tensors), **measures_of(found.total)},
        "layers": [
            {"stack": stack, "layer": layer, "tensors": sums.tensors, **measures_of(sums)}
            for stack, layer, sums in found.layers
        ],
        "tensors": [row_of(tensor) for tensor in found.tensors],
        "unlike": [unlike._asdict() for unlike in found.unlike],
        "only_in_a": list(found.only_in_a),
        "only_in_b": list(found.only_in_b),
    }


def _text(found: Diff) -> list[str]:
    total = found.total
    lines = [f"A  {one_line(found.a)}", f"B  {one_line(found.b)}"]
    if found.is_same:
        return [*lines, f"the same: {plural(total.tensors, 'tensor')}, {show_count(total.elements)} elements"]
    rows = [_HEAD, _row(f"all, {plural(total.tensors, 'tensor')}", total)]
    for stack, layer, sums in found.layers:
        rows.append(_row("in no layer" if layer is None else f"{stack} layer {layer}".strip(), sums))
    lines += ["", *_aligned(rows)]
    if most := found.most_changed(_MOST_TENSORS):
        lines += [
            "",
            "the largest changes, for the tensor's size:",
            *_aligned([_HEAD, *(_row(one.name, one.sums) for one in most)]),
        ]
    if total.nonfinite:
        nonfinite = [f"{one.name} ({one.sums.nonfinite})" for one in found.tensors if one.sums.nonfinite]
        what = (
            f"{plural(total.nonfinite, 'element')} NaN or infinite in A, B or their difference, which leaves no norms: "
        )
        lines.append(what + _listed(nonfinite))
    dtypes = [f"{one.name} {one.a_dtype} and {one.b_dtype}" for one in found.tensors if one.a_dtype != one.b_dtype]
    lists = {
        "of other dtypes, compared by value": dtypes,
        "of other shapes or dtypes, not compared": [f"{one.name} {one.a} and {one.b}" for one in found.unlike],
        "only in A": found.only_in_a,
        "only in B": found.only_in_b,
    }
    for what, names in lists.items():
        if names:
            lines.append(f"{plural(len(names), 'tensor')} {what}: {_listed(names)}")
    return lines


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return one_line(", ".join(names[:_MOST_NAMES])) + more


def _row(label: str, sums: Sums) -> tuple[str, ...]:
    norm, relative, most = (
        "–" if value is None else f"{value:.4g}" for value in (sums.norm, sums.relative, sums.largest)
    )
    cosine = "–" if sums.cosine is None else f"{sums.cosine:.6f}"
    return (one_line(label), norm, relative, cosine, f"{sums.fraction:.2%}", most)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
