"""The index: hostile ones refused, ours as transformers writes them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rv_distributed.checkpoint.index import (
    IndexFormatError,
    build_index,
    is_plain_name,
    missing_shards,
    parse_index,
    shard_name,
)

ESCAPING = {
    "parent": "../x.safetensors",
    "parent alone": "..",
    "here": ".",
    "absolute": "/etc/passwd",
    "subfolder": "sub/x.safetensors",
    "trailing separator": "x/",
    "Windows separator": "..\\x.safetensors",
    "drive": "C:\\x",
    "NUL": "x\0.safetensors",
    "empty": "",
}

REFUSED = {
    "empty": (b"", "is not JSON"),
    "not JSON": (b"weight_map", "is not JSON"),
    "truncated": (b'{"weight_map": {"a": "x', "is not JSON"),
    "not UTF-8": (b'{"weight_map": {"\xff": "x"}}', "is not JSON"),
    "UTF-16": ('{"weight_map": {}}'.encode("utf-16"), "is not JSON"),
    "deep nesting": (b"[" * 100_000, "is not JSON"),
    "an integer of 5000 digits": (b'{"weight_map": {}, "metadata": ' + b"9" * 5000 + b"}", "is not JSON"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "is not JSON"),
    "a list": (b"[]", "has no weight_map"),
    "null": (b"null", "has no weight_map"),
    "no weight_map": (b'{"metadata": {"total_size": 1}}', "has no weight_map"),
    "weight_map a list": (b'{"weight_map": ["a"]}', "has no weight_map"),
    "weight_map null": (b'{"weight_map": null}', "has no weight_map"),
    "shard a number": (b'{"weight_map": {"a": 1}}', "maps tensor 'a' to 1, which is not a file name"),
    "shard null": (b'{"weight_map": {"a": null}}', "maps tensor 'a' to None"),
    "shard a list": (b'{"weight_map": {"a": ["x"]}}', r"maps tensor 'a' to \['x'\]"),
}


@pytest.mark.parametrize(("raw", "what"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_index_is_refused(raw: bytes, what: str) -> None:
    with pytest.raises(IndexFormatError, match=what):
        parse_index(raw)


@pytest.mark.parametrize("shard", ESCAPING.values(), ids=ESCAPING)
def test_a_shard_outside_the_folder_is_refused_by_its_tensor(shard: str) -> None:
    raw = json.dumps({"weight_map": {"good": "x.safetensors", "bad": shard}}).encode()
    with pytest.raises(IndexFormatError, match=r"tensor 'bad' .* not a file name in its folder"):
        parse_index(raw)
    assert not is_plain_name(shard)


@pytest.mark.parametrize("name", ["model.safetensors", "...", ".hidden", "a b", "模型", "..x", "-rf"])
def test_a_name_that_stays_in_its_folder_is_plain(name: str) -> None:
    assert is_plain_name(name)
    assert parse_index(json.dumps({"weight_map": {"a": name}}).encode()) == {"a": name}


def test_an_index_with_other_fields_is_read_for_its_weight_map() -> None:
    raw = b'{"metadata": {"total_size": 12.0}, "x": null, "weight_map": {"b": "2", "a": "1"}}'
    assert list(parse_index(raw).items()) == [("b", "2"), ("a", "1")]
    assert parse_index(b'{"weight_map": {}}') == {}


def test_a_built_index_has_the_bytes_that_transformers_writes() -> None:
    built = build_index({"é.weight": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}, 96)
    assert built.decode() == (
        '{\n  "metadata": {\n    "total_size": 96\n  },\n  "weight_map": {\n'
        '    "é.weight": "model-00001-of-00002.safetensors",\n    "b": "model-00002-of-00002.safetensors"\n  }\n}\n'
    )


@given(st.dictionaries(st.text(), st.text(min_size=1).filter(is_plain_name)), st.integers(0, 2**63))
def test_a_built_index_parses_to_what_it_was_built_from(weight_map: dict[str, str], total_bytes: int) -> None:
    built = build_index(weight_map, total_bytes)
    assert parse_index(built) == weight_map
    assert json.loads(built)["metadata"] == {"total_size": total_bytes}


SHARD_NAMES = {
    (1, 1): "model.safetensors",
    (1, 2): "model-00001-of-00002.safetensors",
    (12, 345): "model-00012-of-00345.safetensors",
    (99999, 99999): "model-99999-of-99999.safetensors",
    (100000, 123456): "model-100000-of-123456.safetensors",
}


@pytest.mark.parametrize(("place", "name"), SHARD_NAMES.items())
def test_shards_have_their_hugging_face_names(place: tuple[int, int], name: str) -> None:
    assert shard_name(*place) == name


def test_shard_names_sort_in_the_order_of_their_numbers() -> None:
    names = [shard_name(number, 1234) for number in range(1, 1235)]
    assert names == sorted(names)
    assert len(set(names)) == 1234


@pytest.mark.parametrize("names", [(1, 2, 3), (0, 1, 2)])
def test_shards_that_count_each_other_are_whole_from_1_or_from_0(names: tuple[int, ...]) -> None:
    shards = [f"model-{number:05d}-of-00003.safetensors" for number in names]
    assert not list(missing_shards([*shards, "consolidated.safetensors", "vision-of-2.safetensors"]))
    for lacking in shards[1:]:
        assert list(missing_shards(name for name in shards if name != lacking)) == [lacking]
