"""An output's manifest and tables, checked against their digests before anything in them is believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from blake3 import blake3

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, PIECES_FILE, TABLE_FILE, Manifest
from rv_distributed.checkpoint.pieces import PieceRow, read_pieces
from rv_distributed.checkpoint.table import TensorRow, read_table
from rv_distributed.checkpoint.uris import join, last_part
from rv_distributed.errors import InputError, Problem, UsageError, VerifyError
from rv_distributed.measures import ULPS_FROM
from rv_distributed.storage import Folder
from rv_distributed.verification.output import open_output

#: What a report asks the options of a manifest for.
_OPTIONS: Final = ("stats", "rounding", "dtype")
_RULES: Final = ("combine", "cast", "copy", "scale")


@dataclass(frozen=True, slots=True)
class Output:
    """What a report is made from."""

    uri: str
    manifest: Manifest
    rows: Sequence[TensorRow]
    pieces: Sequence[PieceRow]
    no_pieces: str = ""
    """Why there are none."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return last_part(self.uri)


def read_output(uri: str) -> Output:
    """Raises InputError where there is no output of ours, or it is not what was written."""
    try:
        folder, manifest, findings = open_output(uri)
    except VerifyError as error:
        raise InputError([_changed(error.uri, finding.file, finding.what) for finding in error.findings]) from error
    problems = [_changed(folder.uri, finding.file, finding.what) for finding in findings]
    problems += _problems_of(folder.uri, manifest)
    present = {file.name for file in folder.files()}
    digests = {file.name: file.digest for file in manifest.files}
    raws = {}
    for name in (TABLE_FILE, PIECES_FILE):
        if name not in present:
            # Without the pieces there is much to tell, and without the tensors nothing.
            problems += [_changed(folder.uri, name, "is missing")] if name == TABLE_FILE else []
            continue
        raws[name] = folder.read(name)
        if name in digests and blake3(raws[name]).hexdigest() != digests[name]:
            problems.append(_changed(folder.uri, name, "differs from what was written"))
    if TABLE_FILE in raws and TABLE_FILE not in digests:
        problems.append(_changed(folder.uri, TABLE_FILE, "is not in the manifest"))
    if problems:
        raise InputError(problems)
    pieces, no_pieces = _pieces(raws.get(PIECES_FILE), known=PIECES_FILE in digests)
    return Output(folder.uri, manifest, _rows(folder, raws[TABLE_FILE]), pieces, no_pieces)


def _changed(uri: str, name: str, what: str) -> Problem:
    remedy = f"rv verify {uri} tells all that differs; make the output again, or take an unchanged copy."
    return Problem(join(uri, name), what, remedy)


def _problems_of(uri: str, manifest: Manifest) -> list[Problem]:
    """What no version of ours writes."""
    lacks = [name for name in _OPTIONS if name not in manifest.options]
    odd = [f"lacks the options {', '.join(lacks)}"] if lacks else []
    try:
        manifest.to_json()
    except ValueError:
        odd.append("holds numbers that are not finite")
    return [_changed(uri, MANIFEST_FILE, what) for what in odd]


def _rows(folder: Folder, raw: bytes) -> list[TensorRow]:
    try:
        rows = read_table(raw)
        for row in rows:
            texts = all(isinstance(text, str) for text in (row.dtype, row.why, row.matched)) and row.rule in _RULES
            counts = row.ulps is None or (len(row.ulps) == len(ULPS_FROM) and None not in row.ulps)
            if not texts or not counts or None in row.shape:
                raise ValueError(f"is not a table of tensors: the row of {row.name!r} is not whole")
    except ValueError as error:
        raise InputError([_changed(folder.uri, TABLE_FILE, str(error))]) from error
    return rows


def _pieces(raw: bytes | None, *, known: bool) -> tuple[list[PieceRow], str]:
    """The pieces, or why there are none."""
    if raw is None or not known:
        why = f"{PIECES_FILE} is missing" if known else f"the output was made without {PIECES_FILE}"
        return [], f"Not known: {why}."
    try:
        pieces = read_pieces(raw)
    except ValueError as error:
        return [], f"Not known: {PIECES_FILE} {error}."
    times = [time for row in pieces for time in (row.done_s, row.read_s, row.compute_s, row.write_s)]
    if not all(time is None or (math.isfinite(time) and time >= 0) for time in times):
        return [], f"Not known: {PIECES_FILE} holds times that are none."
    return pieces, "" if any(row.worker for row in pieces) else "All pieces were kept from an earlier run."


def check_comparable(outputs: Sequence[Output]) -> None:
    """Raise UsageError when an output is given twice, and InputError when outputs do not have the same tensors, so that
    nothing can be compared."""
    first = outputs[0]
    seen: set[str] = set()
    tensors = {(row.name, row.shape) for row in first.rows}
    for other in outputs:
        if other.uri in seen:
            raise UsageError(f"{other.uri} is given twice")
        seen.add(other.uri)
        if {(row.name, row.shape) for row in other.rows} != tensors:
            what = f"has other tensors than {first.uri}"
            raise InputError([Problem(other.uri, what, "Compare outputs of one target, or report on each alone.")])


def names_of(outputs: Sequence[Output]) -> list[str]:
    """The outputs' names, with as many folders before them as it takes to tell them apart."""
    parts = [output.uri.rstrip("/").split("/") for output in outputs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [output.uri for output in outputs]
