"""``rv_pieces.parquet``: one row a piece, with who made it and when. `PieceRow` documents the columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from rv_distributed.checkpoint.parquet import read_parquet, write_parquet


class PieceRow(NamedTuple):
    """One row of the table. What follows ``stop`` is null of a piece that an earlier run had finished."""

    piece: int
    """Its number, from 0, in file order."""
    shard: str
    start: int
    """First byte in the shard's file."""
    stop: int
    worker: str | None = None
    """``host:pid``."""
    attempt: int | None = None
    """How many workers it took."""
    done_s: float | None = None
    """When it was finished, in seconds from the start of the run."""
    read_s: float | None = None
    """Seconds that it took to read; likewise the next two, with the wait for a processor in the first of them."""
    compute_s: float | None = None
    write_s: float | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None
    """In all outputs of the run."""


def write_pieces(rows: Iterable[PieceRow]) -> bytes:
    """The rows as a Parquet file."""
    return write_parquet(rows, _types())


def read_pieces(raw: bytes) -> list[PieceRow]:
    """The rows of a Parquet file. Raises ValueError when it is none, or not ours."""
    try:
        return [PieceRow(**row) for row in read_parquet(raw, _types())]
    except ValueError as error:
        raise ValueError(f"is not a table of pieces: {error}") from None


def _types() -> dict[str, Any]:
    import pyarrow as pa

    texts, seconds = ("shard", "worker"), ("done_s", "read_s", "compute_s", "write_s")
    types = {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(seconds, pa.float64())}
    return {column: types.get(column, pa.int64()) for column in PieceRow._fields}
