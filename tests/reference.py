"""What the code is compared with: the arithmetic in NumPy, and safetensors folders through struct and json.

Written from the specification alone. The arithmetic, the reader and the writer use nothing of rv_distributed;
`described` makes its inputs for tests that need no files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rv_distributed.checkpoint.model import Checkpoint, FileState, Tensor

F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

ITEM_BYTES = {"BOOL": 1, "U8": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8, "F64": 8, "C64": 8}
#: Files of an output that tell when and how fast it was made.
TIMED = ("rv_manifest.json", "rv_pieces.parquet")
USER_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Raw(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = Mapping[str, Raw]


def widen(raw: Raw) -> F32:
    """The elements in float32, which holds every BF16, F16 and F32 value."""
    if raw.dtype == "F32":
        return np.frombuffer(raw.data, np.float32)
    if raw.dtype == "F16":
        with np.errstate(invalid="ignore"):
            return np.frombuffer(raw.data, np.float16).astype(np.float32)
    assert raw.dtype == "BF16", raw.dtype
    return (np.frombuffer(raw.data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: F32, dtype: str) -> bytes:
    """Float32 values rounded to nearest even in ``dtype``."""
    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(np.float16).tobytes()
    assert dtype == "BF16", dtype
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    # The addition would carry a NaN's payload into its exponent.
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).tobytes()


def difference(plus: Raw, minus: Raw | None) -> F32:
    """``d = RN32(a − b)``."""
    if minus is None:
        return widen(plus)
    with np.errstate(all="ignore"):
        return widen(plus) - widen(minus)


def accumulated(target: Raw, vectors: Sequence[tuple[Raw, Raw | None]], alphas: Sequence[float]) -> F32:
    """``acc = t``, then ``acc = RN32(acc + RN32(α·d))`` for each vector in order; those with α = 0 are left out."""
    acc = widen(target)
    with np.errstate(all="ignore"):
        for (plus, minus), alpha in zip(vectors, alphas, strict=True):
            if np.float32(alpha) != 0:
                acc = acc + np.float32(alpha) * difference(plus, minus)
    return acc


def combined(
    target: Raw, vectors: Sequence[tuple[Raw, Raw | None]], alphas: Sequence[float], dtype: str | None = None
) -> Raw:
    """``target + Σ αₖ·dₖ`` in ``dtype``, or in the target's own."""
    dtype = dtype or target.dtype
    if dtype == target.dtype and not any(np.float32(alpha) for alpha in alphas):
        return target
    return Raw(dtype, target.shape, narrow(accumulated(target, vectors, alphas), dtype))


def extracted(plus: Raw, minus: Raw | None, dtype: str) -> Raw:
    return Raw(dtype, plus.shape, narrow(difference(plus, minus), dtype))


def same_bits(found: bytes, wanted: bytes, dtype: str) -> bool:
    """Whether two tensors have the same bits, where any NaN is any other NaN."""
    if found == wanted or dtype not in USER_NAMES or len(found) != len(wanted):
        return found == wanted
    unsigned = np.dtype(f"u{ITEM_BYTES[dtype]}")
    equal = np.frombuffer(found, unsigned) == np.frombuffer(wanted, unsigned)
    nans = np.isnan(widen(Raw(dtype, (), found))) & np.isnan(widen(Raw(dtype, (), wanted)))
    return bool(np.all(equal | nans))


def assert_same(found: Tensors, wanted: Tensors) -> None:
    """The same tensors in the same order, with the same dtypes, shapes and bits."""
    assert list(found) == list(wanted)
    for name, raw in wanted.items():
        assert found[name][:2] == raw[:2], (name, found[name][:2], raw[:2])
        assert same_bits(found[name].data, raw.data, raw.dtype), f"{name}: the bits differ"


def weights(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], scale: float = 0.05) -> Raw:
    """Normally distributed values for float dtypes; random bytes for the others."""
    count = int(np.prod(shape))
    if dtype not in USER_NAMES:
        return Raw(dtype, shape, rng.integers(0, 2, count * ITEM_BYTES[dtype], dtype=np.uint8).tobytes())
    return Raw(dtype, shape, narrow((rng.standard_normal(count) * scale).astype(np.float32), dtype))


def any_bits(rng: np.random.Generator, dtype: str, count: int) -> Raw:
    """Random bit patterns: every exponent is as likely as any other, NaN and infinity included."""
    return Raw(dtype, (count,), rng.integers(0, 256, count * ITEM_BYTES[dtype], dtype=np.uint8).tobytes())


def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    *,
    shards: int = 1,
    pad: int = 0,
    sidecars: Mapping[str, bytes] | None = None,
) -> str:
    """Write tensors in their order over ``shards`` files; ``pad`` spaces behind each header shift its data.

    Nothing is aligned: a tensor starts wherever the one before it ends.
    """
    folder.mkdir(parents=True)
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        data = bytearray()
        for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]:
            raw = tensors[name]
            offsets = [len(data), len(data) + len(raw.data)]
            header[name] = {"dtype": raw.dtype, "shape": list(raw.shape), "data_offsets": offsets}
            data += raw.data
            weight_map[name] = file
        text = json.dumps(header).encode() + b" " * pad
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data)
    if shards > 1:
        index = {"metadata": {"total_size": sum(len(raw.data) for raw in tensors.values())}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path, content in (sidecars or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return str(folder)


def read_file(path: Path) -> dict[str, Raw]:
    """The tensors of one safetensors file, in the order of their data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    found = {}
    for name, entry in entries:
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = Raw(entry["dtype"], tuple(entry["shape"]), content[start:stop])
    return found


def read_checkpoint(folder: str | Path) -> dict[str, Raw]:
    """All tensors of a folder, file by file in the order of the files' names."""
    return {name: raw for path in sorted(Path(folder).glob("*.safetensors")) for name, raw in read_file(path).items()}


def described(uri: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, first_byte: int = 8) -> Checkpoint:
    """A checkpoint of one file that does not exist, from its tensors' dtypes and shapes."""
    entries, end = {}, first_byte
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + ITEM_BYTES[dtype] * int(np.prod(shape))
        entries[name] = Tensor(dtype, shape, "model.safetensors", start, end)
    return Checkpoint(
        uri=uri,
        tensors=entries,
        weight_files=(FileState("model.safetensors", end, "unchanging"),),
        sidecars=(),
        config={},
        fingerprint="blake3:" + "0" * 64,
        revision=None,
        manifest=None,
        warnings=(),
    )
