"""``model.safetensors.index.json``: which shard holds which tensor. Parsed as hostile input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
_COUNTED: Final = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors", re.ASCII)


class IndexFormatError(ValueError):
    """The index is not one: its text says what is wrong."""


def parse_index(raw: bytes) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name to shard file name.

    Raises IndexFormatError for anything but strings, or for a shard outside the checkpoint's folder.
    """
    try:
        document = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise IndexFormatError(f"is not JSON: {error}") from None
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise IndexFormatError("has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard):
            raise IndexFormatError(f"maps tensor {tensor!r} to {shard!r}, which is not a file name in its folder")
    return weight_map


def build_index(weight_map: Mapping[str, str], total_bytes: int) -> bytes:
    """An index as transformers writes it; ``total_bytes`` counts tensor data only."""
    document = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def shard_name(number: int, count: int) -> str:
    """The Hugging Face name of the ``number``-th (from 1) of ``count`` shards."""
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def missing_shards(names: Iterable[str]) -> Iterator[str]:
    """The shards that are not among ``names``, where these count them: ``-00002-of-00005``, from 1 or from 0."""
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in names:
        if counted := _COUNTED.fullmatch(name):
            before, number, count = counted.groups()
            sets.setdefault((before, count), {})[int(number)] = number
    for (before, count), found in sets.items():
        first, width = 0 if 0 in found else 1, len(found[min(found)])
        for number in range(first, first + int(count)):
            if number not in found:
                yield f"{before}-{number:0{width}d}-of-{count}.safetensors"


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder: no separator, no parent, no NUL."""
    return name not in ("", ".", "..") and not any(char in name for char in "/\\\0")
