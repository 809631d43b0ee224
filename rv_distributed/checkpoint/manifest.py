"""``rv_manifest.json``: what an output is, what it was made from and how. Written last, and the last word.

`MANIFEST_SCHEMA` is the JSON schema of the document; the README documents the fields that users read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

MANIFEST_FILE: Final = "rv_manifest.json"
TABLE_FILE: Final = "rv_tensors.parquet"
SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class InputEntry:
    """One checkpoint that was read."""

    role: str
    """target, donor, reference or vector."""
    uri: str
    fingerprint: str
    """See `Checkpoint.fingerprint`."""
    revision: str | None


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One safetensors file."""

    name: str
    bytes: int
    digest: str
    """BLAKE3 over the concatenated raw digests of the header and of every part of a tensor, in file order;
    the parts and their digests stand in rv_tensors.parquet."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file beside the shards and the manifest."""

    name: str
    bytes: int
    digest: str
    """BLAKE3 of the file."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor of an input that has no place in the output."""

    tensor: str
    why: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the whole output."""

    tensors: int
    combined: int
    """Tensors that were computed."""
    cast: int
    """Tensors that were only rounded to another dtype."""
    copied: int
    """Tensors whose bytes are the target's."""
    parameters: int
    data_bytes: int
    v_norm: float | None
    """‖v‖₂ over the computed tensors; None when it is not finite, as for the next two."""
    t_norm: float | None
    """‖t‖₂ over the computed tensors; 0 for a vector."""
    v_max: float | None
    """max |v|."""
    changed_elements: int
    """Elements that differ from the target's; of a vector, those that are not zero."""
    inexact_elements: int
    """Elements of a stored vector that its dtype could not hold exactly."""


@dataclass(frozen=True, slots=True)
class Timings:
    """How long it took, and what was moved. All outputs of one run share the reads."""

    run_s: float
    """Seconds from the first task to the last result; the commit is not in it."""
    read_s: float
    """Seconds that the streams of all workers spent reading, added up; likewise for the next two."""
    compute_s: float
    write_s: float
    bytes_read: int
    bytes_written: int
    pieces: int
    pieces_kept: int
    """Pieces that an earlier, interrupted run had finished."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The document itself."""

    operation: str
    formula: str
    inputs: tuple[InputEntry, ...]
    alphas: tuple[float, ...]
    """One a vector, as used: rounded to float32. Empty for extract."""
    options: Mapping[str, str]
    versions: Mapping[str, str]
    created: str
    """ISO 8601, UTC."""
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    left_out: tuple[LeftOut, ...]
    totals: Totals
    timings: Timings
    schema_version: int = SCHEMA_VERSION

    def with_file(self, entry: FileEntry) -> Manifest:
        """The same manifest with one more file."""
        return replace(self, files=(*self.files, entry))

    def to_json(self) -> bytes:
        """The document as it is stored."""
        return (json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


class ManifestError(ValueError):
    """A document that is not a manifest of a version we read."""


def manifest_from(document: object) -> Manifest:
    """The manifest in a parsed document. Raises ManifestError naming what is wrong."""
    if not isinstance(document, Mapping):
        raise ManifestError("is not a JSON object")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ManifestError(f"has schema_version {version!r}; this version reads {SCHEMA_VERSION}")
    try:
        values = {field.name: document[field.name] for field in fields(Manifest)}
        values["inputs"] = tuple(InputEntry(**item) for item in values["inputs"])
        values["shards"] = tuple(ShardEntry(**item) for item in values["shards"])
        values["files"] = tuple(FileEntry(**item) for item in values["files"])
        values["left_out"] = tuple(LeftOut(**item) for item in values["left_out"])
        values["alphas"] = tuple(values["alphas"])
        values["totals"] = Totals(**values["totals"])
        values["timings"] = Timings(**values["timings"])
    except (KeyError, TypeError) as error:
        raise ManifestError(f"is not a manifest: {error}") from None
    return Manifest(**values)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False}


_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_NUMBER: Final = {"type": "number"}
_NUMBER_OR_NULL: Final = {"type": ["number", "null"]}
_DIGEST: Final = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_TEXTS: Final = {"type": "object", "additionalProperties": _TEXT}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


MANIFEST_SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "rv_manifest.json",
    **_object(
        {
            "schema_version": {"const": SCHEMA_VERSION},
            "operation": {"enum": ["extract", "apply", "transfer"]},
            "formula": _TEXT,
            "inputs": _array(
                _object(
                    {
                        "role": {"enum": ["target", "donor", "reference", "vector"]},
                        "uri": _TEXT,
                        "fingerprint": {"type": "string", "pattern": "^blake3:[0-9a-f]{64}$"},
                        "revision": {"type": ["string", "null"]},
                    }
                )
            ),
            "alphas": _array(_NUMBER),
            "options": _TEXTS,
            "versions": _TEXTS,
            "created": _TEXT,
            "shards": _array(_object({"name": _TEXT, "bytes": _COUNT, "digest": _DIGEST})),
            "files": _array(_object({"name": _TEXT, "bytes": _COUNT, "digest": _DIGEST})),
            "left_out": _array(_object({"tensor": _TEXT, "why": _TEXT})),
            "totals": _object(
                {
                    **dict.fromkeys(("tensors", "combined", "cast", "copied", "parameters", "data_bytes"), _COUNT),
                    **dict.fromkeys(("v_norm", "t_norm", "v_max"), _NUMBER_OR_NULL),
                    **dict.fromkeys(("changed_elements", "inexact_elements"), _COUNT),
                }
            ),
            "timings": _object(
                {
                    **dict.fromkeys(("run_s", "read_s", "compute_s", "write_s"), _NUMBER),
                    **dict.fromkeys(("bytes_read", "bytes_written", "pieces", "pieces_kept"), _COUNT),
                }
            ),
        }
    ),
}
