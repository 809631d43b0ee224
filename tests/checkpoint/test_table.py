"""The table of tensors: rows come back as they were, and the same rows give the same bytes."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from rv_distributed.checkpoint.table import NO_BYTES, PartDigest, TensorRow, read_table, write_table

COMBINED = TensorRow(
    name="model.layers.0.weight",
    dtype="BF16",
    shape=(3, 4),
    shard="model-00001-of-00002.safetensors",
    start=4096,
    stop=4120,
    bytes=24,
    digest="ab" * 32,
    parts=(PartDigest(4096, 4108, "cd" * 32), PartDigest(4108, 4120, "ef" * 32)),
    rule="combine",
    why="",
    matched="donor: model.language_model.layers.0.weight",
    decoded="",
    input_dtypes="donor: F32",
    v_norm=0.1,
    t_norm=1e-300,
    v_t_ratio=0.25,
    cosine=-0.5,
    v_max=math.inf,
    nonzero=12,
    nonzero_fraction=1.0,
    alpha=0.7,
    realised_alpha=0.83,
    relative_error=0.4,
    changed=11,
    changed_fraction=11 / 12,
    absorbed=1,
    absorbed_fraction=1 / 12,
    ulps_max=2**40,
    ulps=(3, 0, 1, 0, 0, 7, 0, 0),
    inexact=None,
    overflowed=1,
    nan=0,
    infinite=2,
    first_nonfinite=None,
)
COPIED = COMBINED._replace(
    name="é 'x'\n",
    dtype="I64",
    shape=(),
    parts=(),
    digest=NO_BYTES,
    rule="copy",
    why="is not a float",
    start=2**62,
    stop=2**62,
    v_norm=None,
    t_norm=None,
    v_t_ratio=None,
    cosine=None,
    v_max=None,
    nonzero=None,
    nonzero_fraction=None,
    alpha=None,
    realised_alpha=None,
    relative_error=None,
    changed=None,
    changed_fraction=None,
    absorbed=None,
    absorbed_fraction=None,
    ulps_max=None,
    ulps=None,
    inexact=2**62,
    overflowed=0,
    nan=3,
    infinite=0,
    first_nonfinite=2**40,
)
ROWS = [COMBINED, COPIED, COMBINED._replace(name="empty", shape=(0, 5))]


def test_rows_come_back_as_they_were_written() -> None:
    assert read_table(write_table(ROWS)) == ROWS


def test_a_table_without_rows_comes_back_empty_with_all_its_columns() -> None:
    raw = write_table([])
    assert read_table(raw) == []
    assert pq.read_schema(pa.BufferReader(raw)).names == list(TensorRow._fields)


texts = st.text(max_size=5)
naturals = st.integers(0, 2**63 - 1)
numbers = st.none() | st.floats(allow_nan=False)
counts = st.none() | naturals
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
rows = st.builds(
    TensorRow,
    *(texts, texts, st.lists(naturals, max_size=3).map(tuple), texts, naturals, naturals, naturals, digests),
    st.lists(st.builds(PartDigest, naturals, naturals, digests), max_size=2).map(tuple),
    *(texts, texts, texts, texts, texts),
    *(numbers, numbers, numbers, numbers, numbers, counts, numbers, numbers, numbers, numbers),
    *(counts, numbers, counts, numbers, counts, st.none() | st.lists(naturals, max_size=8).map(tuple), counts),
    *(naturals, naturals, naturals, counts),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(rows, max_size=3))
def test_any_rows_come_back_with_the_same_bytes_each_time(given_rows: list[TensorRow]) -> None:
    raw = write_table(given_rows)
    assert read_table(raw) == given_rows
    assert write_table(iter(given_rows)) == raw


def test_the_order_of_the_rows_is_kept_and_tells_tables_apart() -> None:
    assert read_table(write_table(ROWS[::-1])) == ROWS[::-1]
    assert write_table(ROWS) != write_table(ROWS[::-1])


def test_other_readers_find_the_documented_columns_and_their_types() -> None:
    table = pq.read_table(pa.BufferReader(write_table(ROWS)))
    assert table.column_names == list(TensorRow._fields)
    assert table.column("shape").to_pylist() == [[3, 4], [], [0, 5]]
    assert table.column("v_norm").to_pylist() == [0.1, None, 0.1]
    assert table.column("parts").to_pylist()[0][1] == {"start": 4108, "stop": 4120, "digest": "ef" * 32}
    types = {column: str(table.schema.field(column).type) for column in ("name", "start", "alpha", "ulps", "infinite")}
    assert types == {
        "name": "string",
        "start": "int64",
        "alpha": "double",
        "ulps": "list<element: int64>",
        "infinite": "int64",
    }


def _parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue())


GOOD = write_table(ROWS)
BAD = {
    "nothing": b"",
    "text": b"name,dtype\n",
    "the magic numbers alone": b"PAR1PAR1",
    "without its last byte": GOOD[:-1],
    "its first half": GOOD[: len(GOOD) // 2],
    "its footer alone": GOOD[-64:],
    "another table": _parquet(name=["a"], rows=[1]),
    "no shape": _parquet(**{column: [""] for column in TensorRow._fields if column != "shape"}),
    "null parts": _parquet(**{column: [None] for column in TensorRow._fields}),
    "a column too many": _parquet(**({c: [[]] for c in TensorRow._fields} | {"extra": [1]})),
}


@pytest.mark.parametrize("raw", BAD.values(), ids=BAD)
def test_bytes_that_are_no_table_of_ours_are_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError, match="is not a table of tensors"):
        read_table(raw)


def test_the_digest_of_nothing_is_that_of_no_bytes() -> None:
    assert blake3(b"").hexdigest() == NO_BYTES


def test_a_table_with_one_byte_changed_is_read_or_refused_and_nothing_else() -> None:
    raw = write_table(ROWS[:1])
    refused = 0
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 0xFF
        try:
            read = read_table(bytes(changed))
        except ValueError:
            refused += 1
        else:
            assert all(isinstance(row, TensorRow) for row in read), at
    assert refused > 8
