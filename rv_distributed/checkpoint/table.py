"""``rv_tensors.parquet``: one row a tensor. `TensorRow` documents the columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from blake3 import blake3

from rv_distributed.checkpoint.parquet import read_parquet, write_parquet

_DIGEST: Final = re.compile("[0-9a-f]{64}")
#: BLAKE3 of nothing: the digest of a tensor without elements.
NO_BYTES: Final = blake3(b"").hexdigest()


_FLOATS: Final = (
    *("v_norm", "t_norm", "v_t_ratio", "cosine", "v_max", "nonzero_fraction"),
    *("alpha", "realised_alpha", "relative_error", "changed_fraction", "absorbed_fraction"),
)


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
    """combine, cast, copy, or scale for the scales of a tensor that was written as FP8 again."""
    why: str
    """Why it was not combined; else empty."""
    matched: str
    """How the vector's elements were found, where not under the tensor's own name and shape; else empty."""
    decoded: str
    """What its elements were decoded from, by role: ``donor: fp8 128×128``; empty where they were only read."""
    input_dtypes: str
    """Dtypes of inputs that are others than ``dtype``, by role: ``donor: F32; reference: BF16``."""
    v_norm: float | None
    """‖v‖₂ of the vector, or of the weighted sum of several. Null when nothing was measured, as for the columns to
    ``inexact``."""
    t_norm: float | None
    """‖t‖₂ of the target; null for a vector, as for all that is relative to a target."""
    v_t_ratio: float | None
    """‖v‖₂ / ‖t‖₂; null when t is 0."""
    cosine: float | None
    """⟨v, t⟩ / (‖v‖₂·‖t‖₂); null when either is 0. Of full statistics, as are those so marked below."""
    v_max: float | None
    """max |v|."""
    nonzero: int | None
    """Elements of v that are not 0."""
    nonzero_fraction: float | None
    alpha: float | None
    """What was asked for; 1 for a weighted sum of several vectors, and for a stored vector."""
    realised_alpha: float | None
    """⟨o − t, v⟩ / ⟨v, v⟩, with o the output; null when v is 0. Full."""
    relative_error: float | None
    """‖(o − t) − αv‖₂ / ‖αv‖₂; null when αv is 0. Full."""
    changed: int | None
    """Elements that differ from the target's, as rounded to this dtype; of a vector, those that are not 0."""
    changed_fraction: float | None
    absorbed: int | None
    """Elements that are the target's although αv is not 0; of a vector, those that became 0."""
    absorbed_fraction: float | None
    """Of ``nonzero``; null when that is 0, or alpha."""
    ulps_max: int | None
    """Largest change, in units in the last place: in steps from one number of the dtype to the next."""
    ulps: tuple[int, ...] | None
    """Elements changed by 1, 2, 3 to 4, 5 to 8, 9 to 16, 17 to 64, 65 to 256 and by more such units. Full."""
    inexact: int | None
    """Elements of a stored vector that its dtype could not hold exactly."""
    overflowed: int
    """Elements that are infinite although target and vector are not. Of dtypes that arithmetic does not read, none is
    looked at, here and in what follows."""
    nan: int
    infinite: int
    first_nonfinite: int | None
    """Index of the first element that is NaN or infinite, counted in row-major order."""


def write_table(rows: Iterable[TensorRow]) -> bytes:
    """The rows as a Parquet file, which is the same for the same rows."""
    plain = ({**row._asdict(), "parts": [part._asdict() for part in row.parts]} for row in rows)
    return write_parquet((row.values() for row in plain), _types())


def read_table(raw: bytes) -> list[TensorRow]:
    """The rows of a Parquet file. Raises ValueError when it is none, or not ours."""
    try:
        rows = read_parquet(raw, _types())
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
                    "ulps": None if row["ulps"] is None else tuple(row["ulps"]),
                    "parts": tuple(PartDigest(**part) for part in row["parts"]),
                }
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"is not a table of tensors: {error}") from None


def _types() -> dict[str, Any]:
    import pyarrow as pa

    types: dict[str, Any] = {
        **dict.fromkeys(
            ("name", "dtype", "shard", "digest", "rule", "why", "matched", "decoded", "input_dtypes"), pa.string()
        ),
        "shape": pa.list_(pa.uint64()),
        "parts": pa.list_(pa.struct([("start", pa.int64()), ("stop", pa.int64()), ("digest", pa.string())])),
        "ulps": pa.list_(pa.int64()),
        **dict.fromkeys(_FLOATS, pa.float64()),
    }
    return {column: types.get(column, pa.int64()) for column in TensorRow._fields}


def digest_of(digests: Sequence[str]) -> str:
    """The digest of what was written in parts: its own if it is one, else BLAKE3 of their raw digests."""
    if len(digests) == 1:
        return digests[0]
    return blake3(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def shard_digest(header: bytes, parts: Sequence[str]) -> str:
    """The digest of a shard from its header and the digests of its tensors' parts, in file order."""
    raw = [blake3(header).digest(), *(bytes.fromhex(digest) for digest in parts)]
    return blake3(b"".join(raw)).hexdigest()
