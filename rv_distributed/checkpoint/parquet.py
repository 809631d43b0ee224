"""Rows as Parquet files, the same for the same rows, and back. pyarrow is imported when there are some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def write_parquet(rows: Iterable[Iterable[Any]], types: dict[str, Any]) -> bytes:
    """A file of rows, whose values stand in the order of ``types``: pyarrow's types of the columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [] for name in types}
    for row in rows:
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=pa.schema(list(types.items()))), sink)
    return bytes(sink.getvalue())


def read_parquet(raw: bytes, types: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file. Raises ValueError when it is none, or has other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(raw))
        if not table.schema.equals(pa.schema(list(types.items()))):
            raise ValueError("it has other columns")
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from None
    return rows
