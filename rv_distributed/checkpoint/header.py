"""The safetensors header: parsed as hostile input, built byte for byte.

A file is an 8-byte little-endian header length ``N``, ``N`` bytes of JSON that map tensor names to
``{"dtype", "shape", "data_offsets"}``, and the data. The rules are those of the format's own text
(https://github.com/huggingface/safetensors): the header is at most 100 MB and starts with ``{``, keys are
unique, and the tensors cover the data from its first byte to its last without overlap or hole.

`open_checkpoint` calls `header_bytes` on a file's first 8 bytes, then `parse_header` on the rest;
the planner calls `build_header` for every shard that it lays out.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from rv_distributed.checkpoint.dtypes import DTYPES

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000
#: Data starts on a page of the file, which suits direct I/O and memory maps of the readers to come.
DATA_ALIGNMENT: Final = 4096

_MAX_U64: Final = 2**64 - 1
_MAYBE_NEGATIVE: Final = re.compile(rb"[\[,:]\s*-")


class HeaderError(ValueError):
    """A header breaks a rule of the format. ``tensor`` names the entry at fault, if it is one."""

    def __init__(self, what: str, tensor: str | None = None) -> None:
        super().__init__(what, tensor)
        self.what, self.tensor = what, tensor


class HeaderEntry(NamedTuple):
    """One tensor of a file, with offsets counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """A parsed header; ``entries`` stand in the order of their data."""

    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]


def header_bytes(prefix: bytes, *, file_bytes: int) -> int:
    """Length of the JSON header, from a file's first 8 bytes and its size.

    Raises HeaderError when the file cannot hold what it announces.
    """
    if len(prefix) < LENGTH_BYTES:
        raise HeaderError(f"holds {file_bytes} bytes, too few for a safetensors header")
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"announces a header of {length} bytes; the format allows {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise HeaderError(f"announces a header of {length} bytes, but the whole file has {file_bytes}")
    return int(length)


def parse_header(raw: bytes, *, data_bytes: int) -> Header:
    """Check and read the JSON of a header; ``data_bytes`` is what the file holds behind it.

    Raises HeaderError at the first broken rule.
    """
    if not raw.startswith(b"{"):
        raise HeaderError("has a header that does not start with '{'")
    try:
        # A hook for integers would cost more than all other checks; and only a minus sign calls for it.
        integer = _integer if _MAYBE_NEGATIVE.search(raw) else None
        document = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=integer
        )
    except HeaderError:
        raise
    except UnicodeDecodeError as error:
        raise HeaderError(f"has a header that is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"has a header that is not JSON: {error}") from None
    if not _is_unicode(document):
        raise HeaderError("has a header with half a surrogate pair in a name")
    metadata = document.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise HeaderError("has a __metadata__ that is not a map of strings")
    if not _is_unicode(metadata) or not _is_unicode(metadata.values()):
        raise HeaderError("has half a surrogate pair in its __metadata__")
    entries = {name: _entry(name, fields) for name, fields in document.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(ordered, data_bytes)
    return Header(ordered, metadata)


def build_header(entries: Mapping[str, HeaderEntry], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before its data: length, JSON, and spaces up to `DATA_ALIGNMENT`."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        document[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start, entry.stop],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    padding = -(LENGTH_BYTES + len(text)) % DATA_ALIGNMENT
    length = len(text) + padding
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"needs a header of {length} bytes; the format allows {MAX_HEADER_BYTES}")
    return struct.pack("<Q", length) + text + b" " * padding


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data; HeaderError when packed elements do not fill whole bytes, or when the number
    of elements does not fit 64 bits, even if a later size is 0."""
    elements = 1
    for size in shape:
        elements *= size
        if elements > _MAX_U64:
            raise HeaderError("has a shape with more elements than 64 bits can count")
    bits = elements * DTYPES[dtype].bits
    if bits % 8:
        raise HeaderError(f"has {bits} bits of {dtype}, which is not a whole number of bytes")
    return bits // 8


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    document = dict(pairs)
    if len(document) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise HeaderError(f"has a header with the key {twice!r} twice")
    return document


def _no_constant(text: str) -> None:
    raise HeaderError(f"has a header that is not JSON: it holds {text}")


def _integer(text: str) -> int:
    # Minus zero equals zero in Python, but it is no unsigned integer: let the checks refuse it.
    return -1 if text == "-0" else int(text)


def _is_unicode(texts: Iterable[str]) -> bool:
    """Whether all texts can be written as UTF-8; JSON's escapes can spell ones that cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_U64


def _entry(name: str, fields: object) -> HeaderEntry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError("needs exactly the keys dtype, shape and data_offsets", name)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"has the unknown dtype {dtype!r}", name)
    if not isinstance(shape, list) or not all(map(_natural, shape)):
        raise HeaderError(f"has a shape that is not a list of sizes: {shape!r:.80}", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise HeaderError(f"has data_offsets that are not a pair of offsets: {offsets!r:.80}", name)
    start, stop = offsets
    try:
        expected = tensor_bytes(dtype, tuple(shape))
    except HeaderError as error:
        raise HeaderError(error.what, name) from None
    if stop - start != expected:
        raise HeaderError(
            f"has {stop - start} bytes at {start} to {stop}, but {dtype} of shape {list(shape)} takes {expected}",
            name,
        )
    return HeaderEntry(dtype, tuple(shape), start, stop)


def _check_cover(ordered: Mapping[str, HeaderEntry], data_bytes: int) -> None:
    end = 0
    for name, entry in ordered.items():
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise HeaderError(f"{kind}: it starts at {entry.start} instead of {end}", name)
        end = entry.stop
    if end > data_bytes:
        raise HeaderError(f"is truncated: the header describes {end} bytes of data, the file has {data_bytes}")
    if end < data_bytes:
        raise HeaderError(f"has {data_bytes - end} bytes behind the {end} bytes of data that its header describes")
