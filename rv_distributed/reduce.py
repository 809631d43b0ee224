"""The reducer: collects the results of all pieces and commits the output.

Call `Reducer.add` for every finished piece, then `Reducer.commit` once, with `Reducer.check_finite` before it
where NaN and infinity are not to be published. The commit checks that the inputs
are still what was read, writes the small files into the staging folder, the manifest last, flushes
everything and publishes it by one rename.
"""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cached_property

from blake3 import blake3

from rv_distributed.checkpoint.card import build_card, license_fields, model_name
from rv_distributed.checkpoint.index import INDEX_FILE, build_index
from rv_distributed.checkpoint.manifest import (
    MANIFEST_FILE,
    TABLE_FILE,
    FileEntry,
    InputEntry,
    LeftOut,
    Manifest,
    ShardEntry,
    Timings,
    Totals,
)
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.checkpoint.sidecars import with_dtype
from rv_distributed.checkpoint.table import NO_BYTES, PartDigest, TensorRow, digest_of, shard_digest, write_table
from rv_distributed.errors import ChangedError, RunError
from rv_distributed.identity import identity_digest
from rv_distributed.measures import largest
from rv_distributed.nonfinite import check_finite
from rv_distributed.plan import Plan, TensorPlan
from rv_distributed.recipe import show_alpha
from rv_distributed.runtime.model import SpanResult
from rv_distributed.staging import Staging
from rv_distributed.storage import open_folder
from rv_distributed.storage.publish import create, make_folder, naming

_CARD_FILE = "README.md"
_MAX_CARD_BYTES = 1_000_000


class Reducer:
    """Collects the pieces of one output of a plan."""

    def __init__(self, plan: Plan, output: int, staging: Staging) -> None:
        self._plan = plan
        self._alphas = plan.alphas[output]
        self._staging = staging
        self._pieces: dict[int, tuple[SpanResult, ...]] = {}

    def add(self, piece: int, spans: tuple[SpanResult, ...]) -> None:
        """Take a finished piece's results."""
        self._pieces[piece] = spans

    def check_finite(self) -> None:
        """Raise NonFiniteError when the output holds NaN or infinity; otherwise as `commit`."""
        check_unchanged(self._plan)
        check_finite(self._plan, self._staging.out, self._rows)

    def commit(self, frame: Checkpoint, opened: Mapping[str, Checkpoint], timings: Timings) -> Manifest:
        """Write the small files, flush everything, publish, and return the manifest.

        ``frame`` is the checkpoint whose sidecar files go with the output. Raises RunError when a piece is
        missing, ChangedError when an input is no longer what the plan was made from, and OSError.
        """
        check_unchanged(self._plan)
        rows = self._rows
        files = [self._write(TABLE_FILE, write_table(rows))]
        if len(self._plan.shards) > 1:
            weight_map = {row.name: row.shard for row in rows}
            files.append(self._write(INDEX_FILE, build_index(weight_map, self._plan.data_bytes)))
        folder = open_folder(frame.uri)
        dtype = dict(self._plan.options)["dtype"]
        for sidecar in frame.sidecars:
            data = folder.read(sidecar.name)
            if sidecar.name == "config.json" and dtype != "auto":
                data = with_dtype(data, dtype)
            files.append(self._write(sidecar.name, data))
        manifest = Manifest(
            operation=self._plan.operation,
            formula=formula(self._plan, self._alphas),
            inputs=tuple(
                InputEntry(item.role, item.uri, item.fingerprint, item.revision) for item in self._plan.inputs
            ),
            alphas=() if self._plan.operation == "extract" else self._alphas,
            options=dict(self._plan.options),
            versions=versions(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            identity=identity_digest(self._staging.identity),
            shards=self._shards(rows),
            files=tuple(files),
            left_out=tuple(LeftOut(name, why) for name, why in self._plan.left_out),
            totals=_totals(self._plan, rows),
            timings=timings,
        )
        names = {checkpoint.uri: model_name(checkpoint.uri) for checkpoint in opened.values()}
        card = self._write(_CARD_FILE, build_card(manifest, names, _license_of(frame)).encode())
        manifest = manifest.with_file(card).sealed()
        entry = self._write(MANIFEST_FILE, manifest.to_json())
        # Once more, as the small files were read after the first time.
        check_unchanged(self._plan)
        self._staging.publish(entry.digest)
        return manifest

    def _write(self, name: str, data: bytes) -> FileEntry:
        path = os.path.join(self._staging.folder, name)
        make_folder(os.path.dirname(path))
        with naming(path), open(path, "wb", opener=create) as file:
            file.write(data)
        return FileEntry(name, len(data), blake3(data).hexdigest())

    @cached_property
    def _rows(self) -> list[TensorRow]:
        """A row for every tensor of the plan, in its order. Raises RunError when a piece is missing."""
        missing = len(self._plan.pieces) - len(self._pieces)
        if missing:
            raise RunError(f"{missing} of {len(self._plan.pieces)} pieces were never finished; run again to continue")
        spans: list[list[tuple[PartDigest, SpanResult]]] = [[] for _ in self._plan.tensors]
        for piece in self._plan.pieces:
            for span in self._pieces[piece.number]:
                tensor = self._plan.tensors[span.tensor]
                part = PartDigest(max(tensor.start, piece.start), min(tensor.stop, piece.stop), span.digest)
                spans[span.tensor].append((part, span))
        return [
            self._row(tensor, tuple(part for part, _ in found), [span for _, span in found])
            for tensor, found in zip(self._plan.tensors, spans, strict=True)
        ]

    def _row(self, tensor: TensorPlan, parts: tuple[PartDigest, ...], spans: list[SpanResult]) -> TensorRow:
        digests = [part.digest for part in parts] or [NO_BYTES]
        measured = tensor.rule == "combine"
        changed = sum(span.changed for span in spans)
        return TensorRow(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            shard=self._plan.shards[tensor.shard].name,
            start=tensor.start,
            stop=tensor.stop,
            bytes=tensor.stop - tensor.start,
            digest=digest_of(digests),
            parts=parts,
            rule=tensor.rule,
            why=tensor.why,
            v_norm=math.sqrt(sum(span.v_sq for span in spans)) if measured else None,
            t_norm=math.sqrt(sum(span.t_sq for span in spans)) if measured and tensor.target else None,
            v_max=largest(span.v_max for span in spans) if measured else None,
            changed=changed if measured else None,
            changed_fraction=changed / max(1, math.prod(tensor.shape)) if measured else None,
            inexact=sum(span.inexact for span in spans) if measured else None,
            nonfinite=sum(span.nonfinite for span in spans),
            first_nonfinite=next((s.first_nonfinite for s in spans if s.first_nonfinite is not None), None),
        )

    def _shards(self, rows: list[TensorRow]) -> tuple[ShardEntry, ...]:
        entries = []
        for shard in self._plan.shards:
            parts = [part.digest for row in rows[shard.first : shard.first + shard.length] for part in row.parts]
            entries.append(ShardEntry(shard.name, shard.size, shard_digest(shard.header, parts)))
        return tuple(entries)


def _totals(plan: Plan, rows: list[TensorRow]) -> Totals:
    rules = Counter(row.rule for row in rows)
    return Totals(
        tensors=len(rows),
        combined=rules["combine"],
        cast=rules["cast"],
        copied=rules["copy"],
        parameters=sum(math.prod(row.shape) for row in rows),
        data_bytes=plan.data_bytes,
        v_norm=_finite(math.hypot(*(row.v_norm or 0.0 for row in rows))),
        t_norm=_finite(math.hypot(*(row.t_norm or 0.0 for row in rows))),
        v_max=_finite(largest(row.v_max or 0.0 for row in rows)),
        changed_elements=sum(row.changed or 0 for row in rows),
        inexact_elements=sum(row.inexact or 0 for row in rows),
        nonfinite_elements=sum(row.nonfinite for row in rows),
    )


def check_unchanged(plan: Plan) -> None:
    """Raise ChangedError when an input file is not in the state in which the plan saw it."""
    for item in plan.inputs:
        folder = open_folder(item.uri)
        for file in item.files:
            if folder.state(file.name) != file.state:
                raise ChangedError(
                    f"{folder.path(file.name)} changed while it was read, so nothing was published. "
                    "Run again with --restart once the input is at rest."
                )


def formula(plan: Plan, alphas: tuple[float, ...]) -> str:
    """What an output is, in symbols."""
    if plan.operation == "extract":
        return "V = A − B"
    if plan.operation == "transfer":
        return f"O = T {_signed(alphas[0])}·(A − B)"
    return "O = T" + "".join(f" {_signed(alpha)}·V{number}" for number, alpha in enumerate(alphas, 1))


def _signed(alpha: float) -> str:
    return f"{'−' if alpha < 0 else '+'} {show_alpha(abs(alpha))}"


def versions() -> dict[str, str]:
    """The versions that an output's bytes may depend on."""
    from importlib import metadata

    packages = ("rv-distributed", "torch", "safetensors", "pyarrow", "blake3")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _license_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The licence in the metadata of a checkpoint's own model card, if it has one."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    path = os.path.join(checkpoint.uri, _CARD_FILE)
    try:
        if os.path.getsize(path) > _MAX_CARD_BYTES:
            return {}
        return license_fields(metadata_load(path) or {})
    except (OSError, ValueError, RecursionError, YAMLError):
        return {}
