"""An output's manifest and tables, checked against their digests before anything in them is believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from rv_distributed.checkpoint.manifest import PIECES_FILE, TABLE_FILE, Manifest
from rv_distributed.checkpoint.pieces import PieceRow, read_pieces
from rv_distributed.checkpoint.table import TensorRow, read_table
from rv_distributed.errors import Finding, InputError, Problem, VerifyError
from rv_distributed.verification.output import open_output


@dataclass(frozen=True, slots=True)
class Output:
    """What a report is made from."""

    name: str
    """Of its folder."""
    manifest: Manifest
    rows: Sequence[TensorRow]
    pieces: Sequence[PieceRow]


def read_output(uri: str) -> Output:
    """Raises InputError where there is no output of ours, VerifyError where it is not what was written."""
    folder, manifest, findings = open_output(uri)
    present = {file.name for file in folder.files()}
    digests = {file.name: file.digest for file in manifest.files}
    raws = {}
    for name in (TABLE_FILE, PIECES_FILE):
        if name not in present:
            findings.append(Finding(name, "is missing"))
            continue
        raws[name] = folder.read(name)
        if blake3(raws[name]).hexdigest() != digests.get(name):
            findings.append(Finding(name, "differs from what was written"))
    if findings:
        raise VerifyError(folder.uri, findings)
    try:
        rows, pieces = read_table(raws[TABLE_FILE]), read_pieces(raws[PIECES_FILE])
    except ValueError as error:
        raise VerifyError(folder.uri, [Finding(TABLE_FILE, str(error))]) from error
    return Output(folder.uri.rstrip("/").rsplit("/", 1)[-1], manifest, rows, pieces)


def check_comparable(outputs: Sequence[Output]) -> None:
    """Raise InputError when outputs do not have the same tensors, so that nothing can be compared."""
    first = outputs[0]
    for other in outputs[1:]:
        if [(row.name, row.shape) for row in other.rows] != [(row.name, row.shape) for row in first.rows]:
            what = f"has other tensors than {first.name}"
            raise InputError([Problem(other.name, what, "Compare outputs of one target, or report on each alone.")])
