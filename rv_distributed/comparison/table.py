"""The table of a comparison: a row a tensor, as Parquet."""

from __future__ import annotations

from typing import Any

from rv_distributed.checkpoint.parquet import write_parquet
from rv_distributed.comparison.model import Diff, Sums, TensorDiff


def measures_of(sums: Sums, *, is_measured: bool = True) -> dict[str, Any]:
    """What sums tell, by its names in tables and documents; None where nothing was measured, or it is not finite."""
    measured = ("nonfinite", "norm", "a_norm", "b_norm", "relative", "cosine", "largest")
    return {
        "elements": sums.elements,
        "differing": sums.differing,
        "fraction": sums.fraction,
        **{name: getattr(sums, name) if is_measured else None for name in measured},
    }


def row_of(tensor: TensorDiff) -> dict[str, Any]:
    """A tensor as JSON values."""
    about = {"name": tensor.name, "a_dtype": tensor.a_dtype, "b_dtype": tensor.b_dtype, "shape": list(tensor.shape)}
    return {**about, **measures_of(tensor.sums, is_measured=tensor.is_measured)}


def write_diff(diff: Diff) -> bytes:
    """The rows as a Parquet file."""
    import pyarrow as pa

    types: dict[str, Any] = {
        **dict.fromkeys(("name", "a_dtype", "b_dtype"), pa.string()),
        "shape": pa.list_(pa.uint64()),
        **dict.fromkeys(("elements", "differing"), pa.int64()),
        "fraction": pa.float64(),
        "nonfinite": pa.int64(),
        **dict.fromkeys(("norm", "a_norm", "b_norm", "relative", "cosine", "largest"), pa.float64()),
    }
    return write_parquet((row_of(tensor).values() for tensor in diff.tensors), types)
