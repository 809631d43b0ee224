"""``model.safetensors.index.json``: which shard holds which tensor. Parsed as hostile input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"


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


def is_plain_name(name: str) -> bool:
    """Whether a name stays in its folder: no separator, no parent, no NUL."""
    return name not in ("", ".", "..") and not any(char in name for char in "/\\\0")
