"""Outputs that are not as we write them, with a manifest whose digests fit: anybody's, for ``rv report``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from rv_distributed.checkpoint.manifest import FileEntry, Manifest, manifest_from
from rv_distributed.checkpoint.pieces import PieceRow, read_pieces, write_pieces
from rv_distributed.checkpoint.table import TensorRow, read_table, write_table


def manifest_of(out: Path) -> Manifest:
    return manifest_from(json.loads((out / "rv_manifest.json").read_bytes()))


def rows_of(out: Path) -> list[TensorRow]:
    return read_table((out / "rv_tensors.parquet").read_bytes())


def pieces_of(out: Path) -> list[PieceRow]:
    return read_pieces((out / "rv_pieces.parquet").read_bytes())


def altered(
    source: Path,
    out: Path,
    *,
    rows: Sequence[TensorRow] | None = None,
    pieces: Sequence[PieceRow] | bytes | None = None,
    **manifest: Any,
) -> Path:
    """``out``, with the tables and the manifest of ``source`` but for what is given here."""
    out.mkdir(parents=True)
    raws = {name: (source / name).read_bytes() for name in ("rv_tensors.parquet", "rv_pieces.parquet")}
    if rows is not None:
        raws["rv_tensors.parquet"] = write_table(rows)
    if pieces is not None:
        raws["rv_pieces.parquet"] = pieces if isinstance(pieces, bytes) else write_pieces(pieces)
    for name, raw in raws.items():
        (out / name).write_bytes(raw)
    files = tuple(FileEntry(name, len(raw), blake3(raw).hexdigest()) for name, raw in raws.items())
    made = replace(manifest_of(source), **{"files": files, **manifest})
    (out / "rv_manifest.json").write_bytes(made.sealed().to_json())
    return out
