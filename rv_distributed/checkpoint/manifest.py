"""``rv_manifest.json``: what an output is, what it was made from and how. Written last, and the last word.

`MANIFEST_SCHEMA` is the JSON schema of the document; the README documents the fields that users read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, TypeVar

from blake3 import blake3

MANIFEST_FILE: Final = "rv_manifest.json"
TABLE_FILE: Final = "rv_tensors.parquet"
PIECES_FILE: Final = "rv_pieces.parquet"
RECIPE_FILE: Final = "rv_recipe.yaml"
SCHEMA_VERSION: Final = 1
ROLES: Final = ("target", "donor", "reference", "vector", "model", "base", "adapter")
OPERATIONS: Final = ("extract", "apply", "transfer", "task_arithmetic", "linear")
#: Their outputs are not a target and what was added to it.
WITHOUT_TARGET: Final = ("extract", "linear")
_HEX: Final = re.compile("[0-9a-f]{64}")
_NO_DIGEST: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class InputEntry:
    """One checkpoint that was read."""

    role: str
    """target, donor, reference, vector, model or base; or adapter, of the one before it."""
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
class FileLeftOut:
    """A file of an input that does not go with the output."""

    file: str
    why: str


@dataclass(frozen=True, slots=True)
class RuleEntry:
    """A rule by which tensors were matched otherwise than by name and shape."""

    rule: str
    what: str
    """What it did, in words."""


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
    """‖t‖₂ over the computed tensors; None for a vector."""
    v_max: float | None
    """max |v|."""
    cosine: float | None
    """Between v and t."""
    alpha: float
    """What was asked for; 1 for a weighted sum of several vectors, and for a stored vector."""
    realised_alpha: float | None
    """⟨o − t, v⟩ / ⟨v, v⟩ over the computed tensors, with o the output; None when v is 0, or not finite, and without
    full statistics, as for the next one."""
    relative_error: float | None
    """‖(o − t) − αv‖₂ / ‖αv‖₂."""
    nonzero_elements: int
    """Elements of v that are not 0. This and the next ones are 0 without statistics."""
    changed_elements: int
    """Elements that differ from the target's, as rounded to the output's dtype; of a vector, those that are not 0."""
    absorbed_elements: int
    """Elements that are the target's although αv is not 0."""
    ulps_max: int
    """Largest change, in units in the last place of its dtype; 0 for a vector."""
    inexact_elements: int
    """Elements of a stored vector that its dtype could not hold exactly."""
    overflowed_elements: int
    """Elements of the output that are infinite although target and vector are not; like the next ones, not 0 only where
    that was allowed."""
    nan_elements: int
    infinite_elements: int


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
    alphas: tuple[float | None, ...]
    """One a vector, as used: rounded to the dtype of the arithmetic; None for one that depends on the tensor, of which
    rv_recipe.yaml tells. Empty for extract."""
    options: Mapping[str, str]
    versions: Mapping[str, str]
    created: str
    """ISO 8601, UTC."""
    identity: str
    """BLAKE3 of all that decided the bytes: inputs with the states of their files, recipe, options, versions. The
    same command knows its finished output by it."""
    shards: tuple[ShardEntry, ...]
    files: tuple[FileEntry, ...]
    rules: tuple[RuleEntry, ...]
    left_out: tuple[LeftOut, ...]
    files_left_out: tuple[FileLeftOut, ...]
    totals: Totals
    timings: Timings
    schema_version: int = SCHEMA_VERSION
    digest: str = _NO_DIGEST
    """BLAKE3 of the document as it is stored, with zeros in place of this digest."""

    @property
    def has_target(self) -> bool:
        """Whether the output is a target and what was added to it."""
        return self.operation not in WITHOUT_TARGET

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file of the output but the manifest, by name."""
        return {shard.name: shard.bytes for shard in self.shards} | {file.name: file.bytes for file in self.files}

    def with_file(self, entry: FileEntry) -> Manifest:
        """The same manifest with one more file."""
        return replace(self, files=(*self.files, entry))

    def sealed(self) -> Manifest:
        """The same manifest with its digest; called when all else in it is final."""
        return replace(self, digest=blake3(replace(self, digest=_NO_DIGEST).to_json()).hexdigest())

    def seals(self, raw: bytes) -> bool:
        """Whether ``raw``, which this was read from, is byte for byte the document that was sealed."""
        return blake3(raw.replace(self.digest.encode(), _NO_DIGEST.encode())).hexdigest() == self.digest

    def to_json(self) -> bytes:
        """The document as it is stored."""
        return (json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


class ManifestError(ValueError):
    """A document that is not a manifest of a version we read."""


def manifest_from(document: object) -> Manifest:
    """The manifest in a parsed document. Raises ManifestError naming what is wrong."""
    if not isinstance(document, dict):
        raise ManifestError("is not a JSON object")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ManifestError(f"has schema_version {version!r}; this version reads {SCHEMA_VERSION}")
    _check_names(Manifest, document)
    values = {
        **document,
        "inputs": _all_of(InputEntry, document.get("inputs")),
        "shards": _all_of(ShardEntry, document.get("shards")),
        "files": _all_of(FileEntry, document.get("files")),
        "rules": _all_of(RuleEntry, document.get("rules")),
        "left_out": _all_of(LeftOut, document.get("left_out")),
        "files_left_out": _all_of(FileLeftOut, document.get("files_left_out")),
        "alphas": tuple(_alpha(alpha) for alpha in _list(document.get("alphas"))),
        "totals": _one_of(Totals, document.get("totals")),
        "timings": _one_of(Timings, document.get("timings")),
    }
    if document["operation"] not in OPERATIONS:
        raise ManifestError(f"is not a manifest: its operation is {document['operation']!r:.80}")
    return _one_of(Manifest, values)


def names_in(raw: bytes) -> set[str]:
    """The names of an output's files, by its manifest, of whatever version. Raises ManifestError."""
    try:
        document = json.loads(raw)
        return {MANIFEST_FILE, *(entry["name"] for kind in ("shards", "files") for entry in document[kind])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestError("is not a manifest") from error


def _alpha(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise ManifestError(f"is not a manifest: it has the alpha {value!r:.80}")
    return value


_Entry = TypeVar("_Entry")
_DIGESTS: Final = ("digest", "identity")
#: By how fields are annotated, the types of their values and their JSON schema; others hold entries, each of which is
#: checked by itself.
_TYPES: Final[dict[str, tuple[tuple[type, ...], dict[str, Any]]]] = {
    "str": ((str,), {"type": "string"}),
    "str | None": ((str, type(None)), {"type": ["string", "null"]}),
    "int": ((int,), {"type": "integer", "minimum": 0}),
    "float": ((int, float), {"type": "number"}),
    "float | None": ((int, float, type(None)), {"type": ["number", "null"]}),
    "Mapping[str, str]": ((dict,), {"type": "object", "additionalProperties": {"type": "string"}}),
}


def _one_of(kind: type[_Entry], document: object) -> _Entry:
    values = _check_names(kind, document)
    for field in fields(kind):  # type: ignore[arg-type]
        value = values[field.name]
        types, _ = _TYPES.get(str(field.type), ((object,), {}))
        sound = isinstance(value, types) and not isinstance(value, bool)
        if isinstance(value, int):
            sound = sound and value >= 0
        if field.name in _DIGESTS:
            sound = sound and _HEX.fullmatch(value) is not None
        if not sound:
            raise ManifestError(f"is not a manifest: {field.name} of {kind.__name__} is {value!r:.80}")
    return kind(**values)


def _check_names(kind: type[Any], document: object) -> dict[str, Any]:
    """The document, whose names are those of the fields of ``kind``."""
    wanted = {field.name for field in fields(kind)}
    if not isinstance(document, dict):
        raise ManifestError(f"is not a manifest: {kind.__name__} is {document!r:.80}")
    if document.keys() != wanted:
        odd = ", ".join(sorted(map(repr, document.keys() ^ wanted)))
        raise ManifestError(f"is not a manifest: {kind.__name__} lacks, or has too many of, {odd}")
    return document


def _all_of(kind: type[_Entry], documents: object) -> tuple[_Entry, ...]:
    return tuple(_one_of(kind, document) for document in _list(documents))


def _list(documents: object) -> list[Any]:
    if not isinstance(documents, list):
        raise ManifestError(f"is not a manifest: {documents!r:.80} is no list")
    return documents


#: The schema of fields whose values are not any of their type.
_SCHEMAS_BY_NAME: Final[dict[str, Any]] = {
    "schema_version": {"const": SCHEMA_VERSION},
    "operation": {"enum": list(OPERATIONS)},
    "role": {"enum": list(ROLES)},
    "fingerprint": {"type": "string", "pattern": "^blake3:[0-9a-f]{64}$"},
    **{name: {"type": "string", "pattern": "^[0-9a-f]{64}$"} for name in _DIGESTS},
}


def _schema_of(kind: type[Any]) -> dict[str, Any]:
    """The schema of an entry, from its fields."""
    properties = {field.name: _SCHEMAS_BY_NAME.get(field.name) or _schema_as(str(field.type)) for field in fields(kind)}
    return {"type": "object", "properties": properties, "required": sorted(properties), "additionalProperties": False}


def _schema_as(annotation: str) -> dict[str, Any]:
    """The schema of a field, from its annotation."""
    if items := re.fullmatch(r"tuple\[(.+), \.\.\.\]", annotation):
        return {"type": "array", "items": _schema_as(items[1])}
    return _TYPES[annotation][1] if annotation in _TYPES else _schema_of(globals()[annotation])


MANIFEST_SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "rv_manifest.json",
    **_schema_of(Manifest),
}
