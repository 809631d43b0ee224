"""Pickles without their power: what data needs is read, everything else is refused before anything happens."""

from __future__ import annotations

import collections
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rv_distributed.checkpoint.inert import Inert, Named, PickleError, load_inert

HERE = __name__


class Point:
    """Something to pickle."""

    def __init__(self, x: Any, y: Any = None) -> None:
        self.x, self.y = x, y


class Called:
    """Pickled as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Point, (1, "two")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_data_of_every_kind_comes_back(protocol: int) -> None:
    values: list[Any] = [
        None,
        True,
        0,
        1,
        255,
        65536,
        -7,
        1 << 40,
        1.5,
        "text ÿ",
        (),
        (1,),
        (1, 2),
        (1, 2, 3, 4),
        {"a": [{}]},
    ]
    assert load_inert(pickle.dumps(values, protocol), (), {}) == values


@pytest.mark.parametrize("protocol", range(2, 6))
def test_classes_are_stood_in_for(protocol: int) -> None:
    raw = pickle.dumps([Point(3, [4]), Called(), collections.OrderedDict(a=1)], protocol)
    names = (f"{HERE}.Point",)
    point, called, mapping = load_inert(raw, names, {"collections.OrderedDict": Named})
    assert (point.name, point.field("x"), point.field("y"), point.field("z")) == (names[0], 3, [4], None)
    assert (called.name, called.args, called.state) == (names[0], (1, "two"), None)
    assert isinstance(point, Inert)
    assert mapping == {"a": 1}


class Calling:
    """Pickled as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "function", [eval, exec, getattr, __import__, subprocess.run, pickle.loads, Path, Point], ids=str
)
def test_nothing_that_is_not_named_is_called(protocol: int, function: Any) -> None:
    with pytest.raises(PickleError):
        load_inert(pickle.dumps(Calling(function, "1"), protocol), ("collections.OrderedDict",), {})


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b".",
        b"\x80",
        b"\x80\x04K\x01",
        b"\x80\x04K\x01K\x02",  # no end
        b"\x80\x04X\xff\xff\xff\xffabc.",  # a text of 4 GB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0fabc.",  # bytes that are made before they are read
        b"\x80\x04h\x07.",  # from a place with nothing in it
        b"\x80\x04\x93.",
        b"\x80\x04K\x01b.",
        b"\x80\x04(K\x01K\x02d.",
        b"I1\n.",
        b"(lp0\n.",
        b"\x80\x04\x82\x01.",  # an extension
        b"\x80\x04Vtext\n.",
        b"\x80\x02P1\n.",
    ],
)
def test_what_is_malformed_or_unneeded_is_refused(raw: bytes) -> None:
    with pytest.raises(PickleError):
        load_inert(raw, (), {})


def test_a_place_far_off_costs_nothing() -> None:
    """The compiled unpickler would make room for two billion places first."""
    assert load_inert(b"\x80\x04K\x05r\xff\xff\xff\x7f.", (), {}) == 5


def test_stand_ins_cannot_be_changed_for_later() -> None:
    """By a state that is set on the class itself."""
    raw = b"\x80\x02cm\nC\n(}X\x05\x00\x00\x00statesK\x01s\x86b."
    with pytest.raises(PickleError):
        load_inert(raw, ("m.C",), {})
    made = load_inert(b"\x80\x02cm\nC\n)\x81.", ("m.C",), {})
    assert (made.state, made.args) == (None, ())


def doubled(times: int) -> bytes:
    """Instructions that leave behind a tuple of two of a tuple of two of …, on top of the others, and in place 0."""
    return b")q\x00" + times * b"h\x00h\x00\x86q\x00"


def test_what_would_take_forever_to_hash_is_no_key() -> None:
    with pytest.raises(PickleError, match="key"):
        load_inert(b"\x80\x02}(" + doubled(99) + b"u.", (), {})
    ordered = b"ccollections\nOrderedDict\n"
    pairs = doubled(99) + ordered + b"h\x00K\x01\x86\x85\x85R."
    with pytest.raises(PickleError):
        load_inert(b"\x80\x02" + pairs, (), {"collections.OrderedDict": Named})
    with pytest.raises(PickleError):
        load_inert(b"\x80\x02" + ordered + b")R}X\x03\x00\x00\x00getK\x01sb.", (), {"collections.OrderedDict": Named})
