"""Headers made to overflow, to lie in what JSON allows, or to cost more time than they are worth."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from rv_distributed.checkpoint.header import HeaderEntry, HeaderError, build_header, parse_header


def header(*, shape: object = (2,), offsets: object = (0, 2), name: str = "a", metadata: object = None) -> bytes:
    """The JSON of a header with one tensor of bytes."""
    document: dict[str, Any] = {name: {"dtype": "U8", "shape": shape, "data_offsets": offsets}}
    if metadata is not None:
        document["__metadata__"] = metadata
    return json.dumps(document, separators=(",", ":")).encode()


TOO_MANY_ELEMENTS = {
    "300 sizes of 2**62": [2**62] * 300,
    "a zero behind too many": [2**40, 2**40, 0],
    "one element more than 64 bits count": [2**32, 2**32],
}


@pytest.mark.parametrize("shape", TOO_MANY_ELEMENTS.values(), ids=TOO_MANY_ELEMENTS)
def test_a_shape_that_64_bits_cannot_count_is_refused_by_name(shape: list[int]) -> None:
    with pytest.raises(HeaderError, match="more elements than 64 bits can count") as caught:
        parse_header(header(shape=shape, offsets=[0, 0]), data_bytes=0)
    assert caught.value.tensor == "a"


def test_thousands_of_huge_sizes_are_refused_before_their_product_grows() -> None:
    raw = header(shape=[2**62] * 100_000, offsets=[0, 0])
    began = time.process_time()
    with pytest.raises(HeaderError, match="64 bits"):
        parse_header(raw, data_bytes=0)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("shape", [(0, 2**40, 2**40), (0, 2**63), (0, 2**64 - 1, 2**64 - 1)], ids=str)
def test_a_zero_in_front_makes_any_sizes_an_empty_tensor(shape: tuple[int, ...]) -> None:
    entry = HeaderEntry("U8", shape, 0, 0)
    assert parse_header(header(shape=shape, offsets=[0, 0]), data_bytes=0).entries == {"a": entry}
    built = build_header({"a": entry}, {})
    assert parse_header(built[8:], data_bytes=0).entries == {"a": entry}


SURROGATES = {
    "the first half": r"\ud800",
    "the second half": r"\udc00",
    "the halves the wrong way round": r"\udc00\ud800",
    "between letters": r"a\udbffb",
}


@pytest.mark.parametrize("text", SURROGATES.values(), ids=SURROGATES)
def test_half_a_surrogate_pair_is_refused_wherever_it_would_be_kept(text: str) -> None:
    for raw in (
        header(name="NAME").replace(b"NAME", text.encode()),
        header(metadata={"KEY": "v"}).replace(b"KEY", text.encode()),
        header(metadata={"k": "VALUE"}).replace(b"VALUE", text.encode()),
    ):
        with pytest.raises(HeaderError, match="half a surrogate pair"):
            parse_header(raw, data_bytes=2)


def test_a_whole_surrogate_pair_is_the_letter_that_it_spells() -> None:
    raw = header(name="NAME", metadata={"k": "NAME"}).replace(b"NAME", rb"\ud83d\ude00")
    parsed = parse_header(raw, data_bytes=2)
    assert (list(parsed.entries), parsed.metadata) == (["\U0001f600"], {"k": "\U0001f600"})


MINUS_ZERO = {
    "a size": (header(shape=[99], offsets=[0, 0]).replace(b"[99]", b"[-0]"), "not a list of sizes"),
    "a second size": (header(shape=[0, 99], offsets=[0, 0]).replace(b",99]", b",\n -0]"), "not a list of sizes"),
    "the first offset": (header().replace(b"[0,2]", b"[-0,2]"), "not a pair of offsets"),
    "the second offset": (header(shape=[0]).replace(b"[0,2]", b"[0,\t-0]"), "not a pair of offsets"),
}


@pytest.mark.parametrize(("raw", "what"), MINUS_ZERO.values(), ids=MINUS_ZERO)
def test_minus_zero_is_no_size_and_no_offset(raw: bytes, what: str) -> None:
    assert b"-0" in raw
    with pytest.raises(HeaderError, match=what) as caught:
        parse_header(raw, data_bytes=2)
    assert caught.value.tensor == "a"


def test_a_name_that_looks_like_a_negative_number_is_a_name() -> None:
    assert list(parse_header(header(name=',-0:-1["-0'), data_bytes=2).entries) == [',-0:-1["-0']


def test_one_key_of_thirty_thousand_that_stands_twice_is_found_at_once() -> None:
    names = [f"model.layers.{number}.weight" for number in range(30_000)]
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = ("{" + ",".join(f'"{name}":{entry}' for name in [*names, names[-1]]) + "}").encode()
    began = time.process_time()
    with pytest.raises(HeaderError, match=rf"the key '{names[-1]}' twice"):
        parse_header(raw, data_bytes=0)
    assert time.process_time() - began < 5
