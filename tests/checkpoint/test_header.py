"""The safetensors header: every rule as a case, and the `safetensors` library as the oracle."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rv_distributed.checkpoint import header as header_module
from rv_distributed.checkpoint.dtypes import DTYPES
from rv_distributed.checkpoint.header import (
    DATA_ALIGNMENT,
    MAX_HEADER_BYTES,
    Header,
    HeaderEntry,
    HeaderError,
    build_header,
    header_bytes,
    parse_header,
    tensor_bytes,
)


def parse_file(raw: bytes) -> Header:
    length = header_bytes(raw[:8], file_bytes=len(raw))
    return parse_header(raw[8 : 8 + length], data_bytes=len(raw) - 8 - length)


def one(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> bytes:
    """The JSON of a header with the one tensor ``a``."""
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()


def several(**entries: tuple[str, list[int], int, int]) -> bytes:
    document = {name: {"dtype": d, "shape": s, "data_offsets": [b, e]} for name, (d, s, b, e) in entries.items()}
    return json.dumps(document).encode()


LENGTHS = {
    "an empty file": (b"", 0, "holds 0 bytes"),
    "seven bytes": (b"\x02" + b"\0" * 6, 7, "holds 7 bytes"),
    "one byte more than the file has": (struct.pack("<Q", 3), 10, "header of 3 bytes, but the whole file has 10"),
    "one byte more than the format allows": (struct.pack("<Q", MAX_HEADER_BYTES + 1), 1 << 40, "allows 100000000"),
    "the largest length": (b"\xff" * 8, 1 << 40, "header of 18446744073709551615 bytes"),
}


@pytest.mark.parametrize(("prefix", "file_bytes", "what"), LENGTHS.values(), ids=LENGTHS)
def test_a_length_that_the_file_cannot_hold_is_refused(prefix: bytes, file_bytes: int, what: str) -> None:
    with pytest.raises(HeaderError, match=what):
        header_bytes(prefix, file_bytes=file_bytes)


def test_the_longest_header_of_the_format_is_accepted_and_only_the_first_8_bytes_count() -> None:
    prefix = struct.pack("<Q", MAX_HEADER_BYTES)
    assert header_bytes(prefix + b"{}", file_bytes=MAX_HEADER_BYTES + 8) == MAX_HEADER_BYTES
    assert header_bytes(struct.pack("<Q", 0), file_bytes=8) == 0


NOT_JSON = {
    "empty": (b"", "does not start with '{'"),
    "leading space": (b" {}", "does not start with '{'"),
    "byte order mark": (b"\xef\xbb\xbf{}", "does not start with '{'"),
    "a list": (b"[]", "does not start with '{'"),
    "not UTF-8": (b'{"\xff":1}', "not UTF-8"),
    "UTF-16": ("{}".encode("utf-16-le"), "not JSON"),
    "unclosed": (b"{", "not JSON"),
    "trailing comma": (one()[:-1] + b",}", "not JSON"),
    "trailing NUL": (one() + b"\0", "not JSON"),
    "two documents": (one() + b"{}", "not JSON"),
    "raw control character": (b'{"a\nb":{}}', "not JSON"),
    "NaN": (b'{"__metadata__":{"k":NaN}}', "it holds NaN"),
    "Infinity": (one(shape="[Infinity]"), "it holds Infinity"),
    "-Infinity": (one(shape="[-Infinity]"), "it holds -Infinity"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, "not JSON"),
    "an integer of 5000 digits": (one(shape="[" + "9" * 5000 + "]"), "not JSON"),
    "tensor twice": (b'{"a":{},"a":{}}', "key 'a' twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "key '__metadata__' twice"),
    "metadata key twice": (b'{"__metadata__":{"k":"1","k":"2"}}', "key 'k' twice"),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32"}}', "key 'dtype' twice"),
    "metadata a list": (b'{"__metadata__":[]}', "__metadata__ that is not a map of strings"),
    "metadata a number": (b'{"__metadata__":{"k":1}}', "__metadata__ that is not a map of strings"),
    "metadata null inside": (b'{"__metadata__":{"k":null}}', "__metadata__ that is not a map of strings"),
    "metadata nested": (b'{"__metadata__":{"k":{}}}', "__metadata__ that is not a map of strings"),
}

ENTRIES = {
    "not a map": (b'{"a":["F32",[2],[0,8]]}', "exactly the keys"),
    "key missing": (b'{"a":{"dtype":"F32","shape":[2]}}', "exactly the keys"),
    "key more": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}', "exactly the keys"),
    "key misspelt": (b'{"a":{"dtype":"F32","Shape":[2],"data_offsets":[0,8]}}', "exactly the keys"),
    "unknown dtype": (one(dtype='"F33"'), "unknown dtype 'F33'"),
    "lower-case dtype": (one(dtype='"f32"'), "unknown dtype 'f32'"),
    "dtype a number": (one(dtype="4"), "unknown dtype 4"),
    "dtype a list": (one(dtype='["F32"]'), "unknown dtype"),
    "shape null": (one(shape="null"), "not a list of sizes"),
    "negative size": (one(shape="[-2]"), "not a list of sizes"),
    "size a float": (one(shape="[2.0]"), "not a list of sizes"),
    "size true": (one(shape="[true,2]"), "not a list of sizes"),
    "size a string": (one(shape='["2"]'), "not a list of sizes"),
    "size of 65 bits": (one(shape=f"[0,{2**64}]", offsets="[0,0]"), "not a list of sizes"),
    "one offset": (one(offsets="[8]"), "not a pair of offsets"),
    "three offsets": (one(offsets="[0,8,8]"), "not a pair of offsets"),
    "negative offset": (one(offsets="[-8,0]"), "not a pair of offsets"),
    "offset false": (one(offsets="[false,8]"), "not a pair of offsets"),
    "offset of 65 bits": (one(offsets=f"[{2**64},{2**64 + 8}]"), "not a pair of offsets"),
    "ends before it starts": (one(offsets="[8,0]"), "has -8 bytes at 8 to 0"),
    "too few bytes": (one(shape="[3]"), r"has 8 bytes at 0 to 8, but F32 of shape \[3\] takes 12"),
    "too many bytes": (one(shape="[]"), r"has 8 bytes at 0 to 8, but F32 of shape \[\] takes 4"),
    "half a byte": (one(dtype='"F4"', shape="[3]", offsets="[0,2]"), "12 bits of F4"),
    "three quarters of a byte": (one(dtype='"F6_E2M3"', shape="[5]", offsets="[0,4]"), "30 bits of F6_E2M3"),
    "packed, unpacked length": (one(dtype='"F4"', shape="[8]"), "F4 of shape .* takes 4"),
    "starts late": (one(offsets="[1,9]"), "leaves a hole before it: it starts at 1 instead of 0"),
}


@pytest.mark.parametrize(("raw", "what"), NOT_JSON.values(), ids=NOT_JSON)
def test_a_header_that_is_not_the_formats_json_is_refused(raw: bytes, what: str) -> None:
    with pytest.raises(HeaderError, match=what) as caught:
        parse_header(raw, data_bytes=8)
    assert caught.value.tensor is None


@pytest.mark.parametrize(("raw", "what"), ENTRIES.values(), ids=ENTRIES)
def test_a_bad_entry_is_refused_by_name(raw: bytes, what: str) -> None:
    with pytest.raises(HeaderError, match=what) as caught:
        parse_header(raw, data_bytes=8)
    assert caught.value.tensor == "a"


F, U = ("F32", [1]), ("U8", [0])
COVER = {
    "same bytes twice": (several(a=(*F, 0, 4), b=(*F, 0, 4)), 4, "overlaps .* starts at 0 instead of 4", "b"),
    "overlap by a byte": (several(a=(*F, 0, 4), b=(*F, 3, 7)), 7, "overlaps .* starts at 3 instead of 4", "b"),
    "hole of a byte": (several(b=(*F, 5, 9), a=(*F, 0, 4)), 9, "hole .* starts at 5 instead of 4", "b"),
    "empty tensor inside another": (several(a=(*F, 0, 4), z=(*U, 2, 2)), 4, "overlaps", "z"),
    "empty tensor behind the data": (several(a=(*F, 0, 4), z=(*U, 5, 5)), 4, "hole", "z"),
    "truncated by a byte": (one(), 7, "truncated: the header describes 8 bytes of data, the file has 7", None),
    "no data": (one(), 0, "truncated", None),
    "a byte too many": (one(), 9, "has 1 bytes behind the 8 bytes of data", None),
    "data without tensors": (b"{}", 4, "has 4 bytes behind the 0 bytes", None),
}


@pytest.mark.parametrize(("raw", "data_bytes", "what", "tensor"), COVER.values(), ids=COVER)
def test_tensors_must_cover_the_data_once(raw: bytes, data_bytes: int, what: str, tensor: str | None) -> None:
    with pytest.raises(HeaderError, match=what) as caught:
        parse_header(raw, data_bytes=data_bytes)
    assert caught.value.tensor == tensor


def test_entries_stand_in_the_order_of_their_data_whatever_the_json_says() -> None:
    raw = several(z=("U8", [3], 8, 11), b=("U8", [2, 0], 8, 8), a=("F32", [2], 0, 8))
    assert list(parse_header(raw, data_bytes=11).entries.items()) == [
        ("a", HeaderEntry("F32", (2,), 0, 8)),
        ("b", HeaderEntry("U8", (2, 0), 8, 8)),
        ("z", HeaderEntry("U8", (3,), 8, 11)),
    ]


ACCEPTED = {
    "no tensors": (b"{}", 0, {}),
    "null metadata": (b'{"__metadata__":null}', 0, {}),
    "metadata": ('{"__metadata__":{"k":"é","":""}}'.encode(), 0, {"k": "é", "": ""}),
    "trailing white space": (one() + b" \n\r\t", 8, {}),
    "packed 4 bits": (one(dtype='"F4"', shape="[16]"), 8, {}),
    "packed 6 bits": (one(dtype='"F6_E3M2"', shape="[4]", offsets="[0,3]"), 3, {}),
    "a scalar": (one(shape="[]", offsets="[0,4]"), 4, {}),
}


@pytest.mark.parametrize(("raw", "data_bytes", "metadata"), ACCEPTED.values(), ids=ACCEPTED)
def test_what_the_format_allows_is_accepted(raw: bytes, data_bytes: int, metadata: dict[str, str]) -> None:
    assert parse_header(raw, data_bytes=data_bytes).metadata == metadata


def test_bytes_of_packed_tensors_are_whole_or_refused() -> None:
    assert [tensor_bytes("F4", (2, 3)), tensor_bytes("F6_E2M3", (4,)), tensor_bytes("BF16", (3, 0)), 8] == [3, 3, 0, 8]
    with pytest.raises(HeaderError, match="not a whole number of bytes"):
        tensor_bytes("F6_E2M3", (2,))


def test_a_header_larger_than_the_format_allows_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "MAX_HEADER_BYTES", 2 * DATA_ALIGNMENT - 8)
    at_the_limit = "x" * (2 * DATA_ALIGNMENT - 8 - len('{"__metadata__":{"k":""}}'))
    assert len(build_header({}, {"k": at_the_limit})) == 2 * DATA_ALIGNMENT
    with pytest.raises(HeaderError, match="needs a header of 12280 bytes"):
        build_header({}, {"k": at_the_limit + "x"})


#: The library's reader of whole files; it has no annotations.
deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize

Layout = dict[str, HeaderEntry]


@st.composite
def layouts(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Layout:
    names = draw(st.lists(st.text(max_size=8).filter(lambda name: name != "__metadata__"), max_size=6, unique=True))
    entries, end = {}, 0
    for name in names:
        dtype = draw(st.sampled_from(dtypes))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        if DTYPES[dtype].bits % 8:
            shape = (*shape, 4)
        entries[name] = HeaderEntry(dtype, shape, end, end + tensor_bytes(dtype, shape))
        end = entries[name].stop
    return entries


metadatas = st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3)


@given(layouts(), metadatas)
def test_a_built_header_parses_to_what_it_was_built_from(entries: Layout, metadata: dict[str, str]) -> None:
    built = build_header(entries, metadata)
    assert len(built) % DATA_ALIGNMENT == 0
    assert built[:9] == struct.pack("<Q", len(built) - 8) + b"{"
    end = max((entry.stop for entry in entries.values()), default=0)
    header = parse_file(built + bytes(end))
    assert (header.entries, header.metadata) == (entries, metadata)


@given(layouts(), st.randoms(use_true_random=False))
def test_the_library_reads_the_same_tensors_from_a_built_file(entries: Layout, random: Any) -> None:
    data = random.randbytes(max((entry.stop for entry in entries.values()), default=0))
    read = dict(deserialize(build_header(entries, {}) + data))
    assert read.keys() == entries.keys()
    for name, entry in entries.items():
        assert (read[name]["dtype"], tuple(read[name]["shape"])) == (entry.dtype, entry.shape)
        assert bytes(read[name]["data"]) == data[entry.start : entry.stop]


def test_safe_open_reads_values_and_metadata_from_a_built_file(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {"a": np.arange(6, dtype="f4").reshape(2, 3), "é": np.array([-1, 2**40]), "": np.zeros(0)}
    names, entries, end = {"float32": "F32", "int64": "I64", "float64": "F64"}, {}, 0
    for name, array in arrays.items():
        entries[name] = HeaderEntry(names[str(array.dtype)], array.shape, end, end + array.nbytes)
        end += array.nbytes
    raw = build_header(entries, {"format": "pt"}) + b"".join(array.tobytes() for array in arrays.values())
    (tmp_path / "model.safetensors").write_bytes(raw)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for loaded in (read, safetensors.numpy.load(raw)):
        assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in loaded.items()} == {
            name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()
        }


def test_a_file_that_the_library_saved_parses_to_its_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "a.weight": torch.randn(7, generator=generator),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    header = parse_file(raw)
    data = raw[8 + header_bytes(raw, file_bytes=len(raw)) :]
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "BOOL": torch.bool, "I64": torch.int64, "F16": torch.half}
    assert header.metadata == {"format": "pt"}
    assert header.entries.keys() == tensors.keys()
    for name, (dtype, shape, start, stop) in header.entries.items():
        assert (dtypes[dtype], shape) == (tensors[name].dtype, tuple(tensors[name].shape))
        assert data[start:stop] == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()


def _pairs(raw: bytes) -> list[tuple[str, Any]]:
    """The top level of a header, with nested objects as lists of pairs too, so that nothing is lost."""
    length = int.from_bytes(raw[:8], "little")
    document: list[tuple[str, Any]] = json.loads(raw[8 : 8 + length], object_pairs_hook=_Pairs)
    return document


class _Pairs(list[tuple[str, Any]]):
    """A JSON object; a JSON array is a plain list."""


def _repeats(pairs: list[tuple[str, Any]]) -> bool:
    return len(dict(pairs)) != len(pairs)


def _any_entry(raw: bytes, broken: Callable[[Any], bool]) -> bool:
    return any(broken(entry) for name, entry in _pairs(raw) if name != "__metadata__")


#: Where the library reads what the format's text does not allow: each tells whether a file is such a case.
STRICTER: dict[str, Callable[[bytes], bool]] = {
    "the header must begin with {": lambda raw: raw[8:9] != b"{",
    "duplicate tensors are disallowed": lambda raw: _repeats(_pairs(raw)),
    "duplicate keys of the metadata are disallowed": lambda raw: any(
        isinstance(fields, _Pairs) and _repeats(fields) for _, fields in _pairs(raw)
    ),
    "a tensor is an object": lambda raw: _any_entry(raw, lambda entry: not isinstance(entry, _Pairs)),
    "a tensor has three keys": lambda raw: _any_entry(raw, lambda entry: len(entry) != 3),
    "a dtype is a string": lambda raw: _any_entry(
        raw, lambda entry: isinstance(entry, _Pairs) and not isinstance(dict(entry)["dtype"], str)
    ),
}

STRICTER_FILES = {
    "the header must begin with {": b" " + one(),
    "duplicate tensors are disallowed": one()[:-1] + b"," + one()[1:],
    "duplicate keys of the metadata are disallowed": b'{"__metadata__":{"k":"1","k":"2"},' + one()[1:],
    "a tensor is an object": b'{"a":["F32",[2],[0,8]]}',
    "a tensor has three keys": one()[:-2] + b',"x":1}}',
    "a dtype is a string": one(dtype='{"F32":null}'),
}


def accepted_by_us(raw: bytes) -> bool:
    try:
        parse_file(raw)
    except HeaderError:
        return False
    return True


def accepted_by_the_library(raw: bytes) -> bool:
    try:
        deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


@pytest.mark.parametrize("rule", STRICTER)
def test_we_are_stricter_than_the_library_where_the_text_is(rule: str) -> None:
    raw = struct.pack("<Q", len(STRICTER_FILES[rule])) + STRICTER_FILES[rule] + bytes(8)
    assert STRICTER[rule](raw)
    assert accepted_by_the_library(raw)
    assert not accepted_by_us(raw)


# No "-" among these and no product beyond 64 bits: there we accept what the library refuses (-0, [2**40, 2**40, 0]).
INSERTED = st.sampled_from(
    [b" ", b"0", b"1", b",", b'"', b"{", b"}", b"[", b"]", b".", b"e", b"\\", b"\n", b"\0", b"\xc3"]
)
SIZES = st.sampled_from([0, 1, 2, 3, 4, 8, -1, 1.0, True, None, "1", 2**20, 2**64, [1]])
DTYPE_VALUES = st.sampled_from([*DTYPES, "F33", "f32", "", 4, None, ["F32"], {"F32": None}])


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A valid file after one to three changes: to its values, to its keys, to its bytes or to its length."""
    entries = draw(layouts(dtypes=("F32", "U8", "BF16", "F4", "I64")).filter(bool))
    document: dict[str, Any] = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start, entry.stop]}
        for name, entry in entries.items()
    }
    end = max(entry.stop for entry in entries.values())
    changes = draw(st.lists(st.sampled_from(["value", "keys", "bytes", "data", "length", "none"]), max_size=3))
    for change in changes:
        fields = document[draw(st.sampled_from(sorted(entries)))]
        if change == "value":
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            if key == "dtype":
                fields[key] = draw(DTYPE_VALUES)
            elif fields.get(key):
                fields[key][draw(st.integers(0, len(fields[key]) - 1))] = draw(SIZES)
        elif change == "keys":
            if draw(st.booleans()):
                fields["extra"] = draw(st.sampled_from([None, 1, [[]]]))
            else:
                fields.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
    if draw(st.booleans()):
        document["__metadata__"] = draw(st.one_of(metadatas, st.sampled_from([None, [], "x", {"k": 1}, {"k": None}])))
    text = json.dumps(document, ensure_ascii=False, indent=draw(st.sampled_from([None, 1]))).encode()
    length = len(text)
    for change in changes:
        at = draw(st.integers(0, len(text)))
        if change == "bytes":
            text = text[:at] + draw(INSERTED) + text[at + draw(st.integers(0, 1)) :]
            length = len(text)
        elif change == "length":
            length = max(0, length + draw(st.integers(-2, 2)))
        elif change == "data":
            end = max(0, end + draw(st.integers(-2, 2)))
    return struct.pack("<Q", length) + text + bytes(end)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(mutated_files())
def test_we_accept_what_the_library_accepts(raw: bytes) -> None:
    expected = accepted_by_the_library(raw)
    if expected:
        expected = not any(stricter(raw) for stricter in STRICTER.values())
    assert accepted_by_us(raw) == expected
