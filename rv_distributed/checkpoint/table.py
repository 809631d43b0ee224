"""``rv_tensors.parquet``: one row a tensor. `ROW_COLUMNS` documents the columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from blake3 import blake3

_DIGEST: Final = re.compile("[0-9a-f]{64}")
#: BLAKE3 of nothing: the digest of a tensor without elements.
NO_BYTES: Final = blake3(b"").hexdigest()


class PartDigest(NamedTuple):
    """A part of a tensor that was written as one, and its digest."""

    start: int
    """First byte in the shard's file."""
    stop: int
    digest: str
    """BLAKE3 of these bytes."""


class TensorRow(NamedTuple):
    """One row of the table."""

    name: str
    dtype: str
    """Of the output, by its safetensors name."""
    shape: tuple[int, ...]
    shard: str
    start: int
    """First byte in the shard's file."""
    stop: int
    bytes: int
    digest: str
    """BLAKE3 of its bytes when it has one part; else of the parts' concatenated raw digests."""
    parts: tuple[PartDigest, ...]
    rule: str
    """combine, cast or copy."""
    why: str
    """Why it was not combined; else empty."""
    v_norm: float | None
    """‖v‖₂; null when nothing was measured, as for the columns after it."""
    t_norm: float | None
    """‖t‖₂ of the target; null for a vector."""
    v_max: float | None
    """max |v|."""
    changed: int | None
    """Elements that differ from the target's; of a vector, those that are not zero."""
    changed_fraction: float | None
    inexact: int | None
    """Elements of a stored vector that its dtype could not hold exactly."""
    nonfinite: int
    """Elements that are NaN or infinite; of dtypes that arithmetic does not read, none is looked at."""
    first_nonfinite: int | None
    """Index of the first of them, counted in row-major order."""


def write_table(rows: Iterable[TensorRow]) -> bytes:
    """The rows as a Parquet file, which is the same for the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    columns: dict[str, list[Any]] = {column: [] for column in TensorRow._fields}
    for row in rows:
        for column, value in zip(TensorRow._fields, row, strict=True):
            columns[column].append([part._asdict() for part in row.parts] if column == "parts" else value)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink)
    return bytes(sink.getvalue())


def read_table(raw: bytes) -> list[TensorRow]:
    """The rows of a Parquet file. Raises ValueError when it is none, or not ours."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(raw))
        if not table.schema.equals(_schema()):
            raise ValueError("it has other columns")
        rows: Sequence[dict[str, Any]] = table.to_pylist()
        for row in rows:
            digests = [row["digest"], *(part["digest"] for part in row["parts"])]
            places = [row["start"], row["stop"], *(place for p in row["parts"] for place in (p["start"], p["stop"]))]
            if None in places or row["name"] is None or not all(_DIGEST.fullmatch(digest) for digest in digests):
                raise ValueError(f"the row of {row['name']!r} is not whole")
        return [
            TensorRow(
                **{
                    **row,
                    "shape": tuple(row["shape"]),
                    "parts": tuple(PartDigest(**part) for part in row["parts"]),
                }
            )
            for row in rows
        ]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is not a table of tensors: {error}") from None


def _schema() -> Any:
    import pyarrow as pa

    types: dict[str, Any] = {
        "name": pa.string(),
        "dtype": pa.string(),
        "shape": pa.list_(pa.uint64()),
        "shard": pa.string(),
        "start": pa.int64(),
        "stop": pa.int64(),
        "bytes": pa.int64(),
        "digest": pa.string(),
        "parts": pa.list_(pa.struct([("start", pa.int64()), ("stop", pa.int64()), ("digest", pa.string())])),
        "rule": pa.string(),
        "why": pa.string(),
        "v_norm": pa.float64(),
        "t_norm": pa.float64(),
        "v_max": pa.float64(),
        "changed": pa.int64(),
        "changed_fraction": pa.float64(),
        "inexact": pa.int64(),
        "nonfinite": pa.int64(),
        "first_nonfinite": pa.int64(),
    }
    return pa.schema([(column, types[column]) for column in TensorRow._fields])


def digest_of(digests: Sequence[str]) -> str:
    """The digest of what was written in parts: its own if it is one, else BLAKE3 of their raw digests."""
    if len(digests) == 1:
        return digests[0]
    return blake3(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def shard_digest(header: bytes, parts: Sequence[str]) -> str:
    """The digest of a shard from its header and the digests of its tensors' parts, in file order."""
    raw = [blake3(header).digest(), *(bytes.fromhex(digest) for digest in parts)]
    return blake3(b"".join(raw)).hexdigest()
