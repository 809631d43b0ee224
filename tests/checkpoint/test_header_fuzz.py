"""The header parser against the `safetensors` library, over many thousand files that are almost right.

Each file begins as a valid one and gets up to three changes, most of them to the structure of its header. We must
accept what the library accepts, and read the same tensors in it, but for the rules of `STRICTER`.
"""

from __future__ import annotations

import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from test_header import STRICTER, deserialize, parse_file

from rv_distributed.checkpoint.dtypes import DTYPES
from rv_distributed.checkpoint.header import Header, HeaderError, tensor_bytes

CASES = 25_000
CASES_ON_DISK = 1_000

Random = random.Random


class Token(str):
    """JSON as it is to stand in the file."""


class Pairs(list[list[Any]]):
    """A JSON object that may have a key twice."""


def show(value: object) -> str:
    if isinstance(value, Token):
        return value
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{show(key)}:{show(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(show, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


class Draft:
    """A file that is being made: the header's document, and how it is laid out around it."""

    def __init__(self, rng: Random) -> None:
        self.document, end = Pairs(), 0
        names = rng.sample(["a", "b.weight", "é", "", "model.layers.0", "\U0001f600", "__metadata", '"\\\n'], 4)
        for name in names[: rng.choice((0, 1, 1, 2, 2, 3, 4))]:
            dtype = rng.choice(list(DTYPES))
            shape = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.randrange(4))]
            if DTYPES[dtype].bits % 8:
                shape.append(4)
            stop = end + tensor_bytes(dtype, tuple(shape))
            self.document.append([name, Pairs([["dtype", dtype], ["shape", shape], ["data_offsets", [end, stop]]])])
            end = stop
        rng.shuffle(self.document)
        if rng.random() < 0.3:
            self.document.insert(rng.randrange(len(self.document) + 1), ["__metadata__", Pairs([["format", "pt"]])])
        self.data = rng.randbytes(end)
        self.before, self.behind = b"", b" " * rng.choice((0, 0, 1, 7))
        self.length_by = 0

    @property
    def entries(self) -> list[list[Any]]:
        return [item for item in self.document if isinstance(item[1], Pairs) and item[0] != "__metadata__"]

    def field(self, rng: Random, key: str) -> list[Any] | None:
        """The pair of a key of some tensor."""
        found = [pair for _, fields in self.entries for pair in fields if pair[0] == key]
        return rng.choice(found) if found else None

    def to_bytes(self) -> bytes:
        text = self.before + show(self.document).encode("utf-8", "surrogatepass") + self.behind
        return struct.pack("<Q", max(0, len(text) + self.length_by) % 2**64) + text + self.data


ODD = [
    *(0, 1, 2, 3, 4, 7, 8, -1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 2**65, 10**30),
    *(None, True, False, 1.0, 1.5, "1", "", [], [1], Pairs(), Pairs([["a", 1]])),
    *map(Token, ("-0", "-0.0", "01", "1e0", "1E2", "+1", "1.", ".5", "0x1", "NaN", "Infinity", "-", "9" * 400, "1 ")),
]
TEXTS = [
    *("F32", "BF16", "f32", "F33", "", "__metadata__", "\x7f", "\ud800", "\u2028", "\ufeff", "\U0001f600"),
    *map(Token, (r'"\ud83d\ude00"', r'"\ud83d"', r'"\ude00"', r'"\ud83d\ud83d"', r'"F\u00332"', r'"\x"', r'"\u12"')),
    *map(Token, ('"\t"', '"\0"', "'F32'", "F32", '"', r'"\/"', r'"\u0000"')),
]


def dtypes(rng: Random, draft: Draft) -> None:
    if pair := draft.field(rng, "dtype"):
        as_variant = Pairs([[pair[1], None]]) if isinstance(pair[1], str) else None
        pair[1] = as_variant if rng.random() < 0.3 else rng.choice([*DTYPES, *TEXTS, *ODD, ["F32"], as_variant])


def shape(rng: Random, draft: Draft) -> None:
    if pair := draft.field(rng, "shape"):
        if not isinstance(pair[1], list) or isinstance(pair[1], Pairs) or rng.random() < 0.2:
            pair[1] = rng.choice(ODD)
        elif rng.random() < 0.5:
            pair[1].insert(rng.randrange(len(pair[1]) + 1), rng.choice([1, 1, 0, *ODD]))
        elif pair[1]:
            pair[1][rng.randrange(len(pair[1]))] = rng.choice(ODD)


def same_size_shape(rng: Random, draft: Draft) -> None:
    """Other sizes with the same product, which is a valid file; among them some that overflow on the way."""
    if (pair := draft.field(rng, "shape")) and isinstance(pair[1], list):
        rng.shuffle(pair[1])
        if 0 in pair[1]:
            pair[1].insert(rng.randrange(len(pair[1]) + 1), rng.choice((2**32, 2**63, 2**64 - 1)))


def offsets(rng: Random, draft: Draft) -> None:
    if pair := draft.field(rng, "data_offsets"):
        if not isinstance(pair[1], list) or len(pair[1]) != 2 or rng.random() < 0.1:
            pair[1] = rng.choice(ODD)
        elif rng.random() < 0.4:
            by = rng.choice((-8, -1, 1, 2, 8, 2**64))
            pair[1] = [by + offset if type(offset) is int else offset for offset in pair[1]]
        elif rng.random() < 0.3:
            pair[1] = rng.choice((pair[1][::-1], pair[1][:1], [*pair[1], 0]))
        else:
            pair[1][rng.randrange(2)] = rng.choice(ODD)


def swap_offsets(rng: Random, draft: Draft) -> None:
    one, other = draft.field(rng, "data_offsets"), draft.field(rng, "data_offsets")
    if one and other:
        one[1], other[1] = other[1], one[1]


def empty_tensor(rng: Random, draft: Draft) -> None:
    at = rng.choice((0, len(draft.data), rng.randrange(len(draft.data) + 1)))
    fields = Pairs([["dtype", rng.choice(list(DTYPES))], ["shape", [0, rng.randrange(3)]], ["data_offsets", [at, at]]])
    draft.document.insert(rng.randrange(len(draft.document) + 1), [f"empty {at}", fields])


def scalar(rng: Random, draft: Draft) -> None:
    end = len(draft.data)
    fields = Pairs([["dtype", "F32"], ["shape", []], ["data_offsets", [end, end + 4]]])
    draft.document.append(["scalar", fields])
    draft.data += rng.randbytes(4)


def duplicate(rng: Random, draft: Draft) -> None:
    """A key twice: a tensor's, a field's, or the metadata's."""
    pairs = rng.choice([draft.document, *(value for _, value in draft.document if isinstance(value, Pairs))])
    if pairs:
        pairs.insert(rng.randrange(len(pairs) + 1), list(rng.choice(pairs)))


def keys(rng: Random, draft: Draft) -> None:
    if draft.entries:
        fields = rng.choice(draft.entries)[1]
        match rng.randrange(4):
            case 0:
                fields.append([rng.choice(("extra", "Dtype", "", "__metadata__")), rng.choice(ODD)])
            case 1 if fields:
                fields.pop(rng.randrange(len(fields)))
            case 2 if fields:
                rng.choice(fields)[0] = rng.choice(TEXTS)
            case _:
                rng.shuffle(fields)


def names(rng: Random, draft: Draft) -> None:
    if draft.document:
        rng.choice(draft.document)[0] = rng.choice(TEXTS)


def entry(rng: Random, draft: Draft) -> None:
    if draft.document:
        item = rng.choice(draft.document)
        as_list = [value for _, value in item[1]] if isinstance(item[1], Pairs) else []
        item[1] = as_list if rng.random() < 0.5 else rng.choice(ODD)


def metadata(rng: Random, draft: Draft) -> None:
    texts: list[Any] = [*TEXTS, *ODD]
    whole = rng.choice([None, Pairs(), *ODD]) if rng.random() < 0.3 else None
    some = Pairs([[rng.choice(TEXTS), rng.choice(texts if rng.random() < 0.3 else ["", "v", "é"])] for _ in range(2)])
    document = [item for item in draft.document if item[0] != "__metadata__" or rng.random() < 0.05]
    draft.document[:] = [*document, ["__metadata__", whole if rng.random() < 0.4 else some]]


def nesting(rng: Random, draft: Draft) -> None:
    depth = rng.choice((1, 10, 120, 126, 127, 128, 129, 200, 100_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    value = Token(opening * depth + "1" + closing * depth)
    if draft.entries and rng.random() < 0.5:
        rng.choice(draft.entries)[1].append(["extra", value])
    else:
        draft.document.append(["deep", value])


def padding(rng: Random, draft: Draft) -> None:
    odd = rng.choice(
        (b" " * 100, b"\n", b"\t\r\n ", b"\0", b"\xa0", b"\x0c", b"x", b"{}", b",", b"\xef\xbb\xbf", b"\xff")
    )
    if rng.random() < 0.7:
        draft.behind += odd
    else:
        draft.before += odd


def data(rng: Random, draft: Draft) -> None:
    draft.data = rng.choice((draft.data[:-1], draft.data[:-8], draft.data + b"\0", draft.data + bytes(8), b""))


def length(rng: Random, draft: Draft) -> None:
    draft.length_by = rng.choice((-(10**9), -2, -1, 1, 2, 8, 100, 100_000_000, 2**32, 2**63))


def length_into_padding(rng: Random, draft: Draft) -> None:
    """A length that leaves out some padding, which thereby becomes data."""
    draft.length_by = -rng.randrange(len(draft.behind) + 1)
    draft.data = draft.data[-draft.length_by :]


CHANGES: list[Callable[[Random, Draft], None]] = [
    *(dtypes, shape, same_size_shape, offsets, swap_offsets, empty_tensor, scalar, duplicate, keys, names, entry),
    *(metadata, nesting, padding, data, length, length_into_padding),
]
#: Those that mostly leave a file valid, so that the others' traces do not hide behind an earlier fault.
GENTLE = [same_size_shape, empty_tensor, scalar, padding, metadata, swap_offsets, keys]


def scribble(rng: Random, raw: bytes) -> bytes:
    """Bytes flipped, replaced, removed or repeated, with a liking for the header."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(raw) if rng.random() < 0.3 else min(len(raw), 120)) if raw else 0
        new = rng.choice(
            (b"", bytes([rng.randrange(256)]), rng.choice((b" ", b"0", b"9", b"-", b'"', b",", b"]", b"}")))
        )
        match rng.randrange(3):
            case 0:
                raw = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :] if raw else raw
            case 1:
                raw = raw[:at] + new + raw[at + 1 :]
            case _:
                raw = raw[:at]
    return raw


def fuzzed_file(rng: Random) -> bytes:
    draft = Draft(rng)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        rng.choice(GENTLE)(rng, draft)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        rng.choice(CHANGES)(rng, draft)
    raw = draft.to_bytes()
    return scribble(rng, raw) if rng.random() < 0.15 else raw


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def read_by_us(raw: bytes) -> tuple[Tensors, Header] | None:
    try:
        header = parse_file(raw)
    except HeaderError:
        return None
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    return {name: (e.dtype, e.shape, data[e.start : e.stop]) for name, e in header.entries.items()}, header


def read_by_the_library(raw: bytes) -> Tensors | None:
    try:
        read = deserialize(raw)
    except safetensors.SafetensorError:
        return None
    return {name: (of["dtype"], tuple(of["shape"]), bytes(of["data"])) for name, of in read}


def test_we_accept_what_the_library_accepts_and_read_the_same_tensors() -> None:
    rng = Random(20_260_401)
    verdicts: Counter[str] = Counter()
    for number in range(CASES):
        raw = fuzzed_file(rng)
        expected, ours = read_by_the_library(raw), read_by_us(raw)
        if expected is None:
            verdicts["refused"] += 1
            assert ours is None, (number, raw)
            continue
        rules = [rule for rule, applies in STRICTER.items() if applies(raw)]
        if rules:
            verdicts.update(rules)
            assert ours is None, (number, rules, raw)
        else:
            verdicts["accepted"] += 1
            assert ours is not None, (number, raw)
            assert ours[0] == expected, (number, raw)
    # A fuzzer whose files are nearly all refused, or nearly all accepted, shows nothing.
    assert verdicts["accepted"] > CASES // 4, verdicts
    assert verdicts["refused"] > CASES // 4, verdicts
    assert all(verdicts[rule] >= 20 for rule in STRICTER), verdicts


def test_safe_open_of_files_agrees_with_the_library_s_reader_of_bytes(tmp_path: Path) -> None:
    """What the fuzz test above stands on; and `safe_open` alone shows the metadata."""
    rng = Random(7)
    path, with_metadata = tmp_path / "model.safetensors", 0
    for number in range(CASES_ON_DISK):
        raw = fuzzed_file(rng)
        path.write_bytes(raw)
        expected = read_by_the_library(raw)
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
                shapes = {name: (of.get_dtype(), tuple(of.get_shape())) for name, of in slices.items()}
                found = file.metadata() or {}
        except safetensors.SafetensorError:
            assert expected is None, (number, raw)
            continue
        assert expected is not None, (number, raw)
        assert shapes == {name: (dtype, shape) for name, (dtype, shape, _) in expected.items()}, (number, raw)
        if (ours := read_by_us(raw)) is not None:
            assert ours[1].metadata == found, (number, raw)
            with_metadata += bool(found)
    assert with_metadata > CASES_ON_DISK // 20
