"""The reducer: collects the results of all pieces and commits the output.

Call `Reducer.add` for every finished piece, then `Reducer.commit` once, with `Reducer.check_finite` before it
where NaN and infinity are not to be published. The commit writes the small files into the staging folder, checks that
the inputs are still what was read, flushes everything and publishes it by one rename, the manifest last.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cached_property

from blake3 import blake3

from rv_distributed.checkpoint.card import build_card, license_fields, metadata_of, model_name
from rv_distributed.checkpoint.fp8 import fp8_scheme
from rv_distributed.checkpoint.index import INDEX_FILE, build_index
from rv_distributed.checkpoint.manifest import (
    PIECES_FILE,
    RECIPE_FILE,
    TABLE_FILE,
    FileEntry,
    FileLeftOut,
    InputEntry,
    LeftOut,
    Manifest,
    RuleEntry,
    ShardEntry,
    Timings,
    Totals,
)
from rv_distributed.checkpoint.pieces import PieceRow, write_pieces
from rv_distributed.checkpoint.sidecars import with_dtype, without_quantization
from rv_distributed.checkpoint.table import TensorRow, shard_digest, write_table
from rv_distributed.errors import ChangedError, RunError
from rv_distributed.identity import identity_digest
from rv_distributed.nonfinite import check_finite
from rv_distributed.plan import Plan, is_of_scales
from rv_distributed.recipe import show_alpha
from rv_distributed.results import scale_bytes, tensor_rows
from rv_distributed.runtime.model import SpanResult
from rv_distributed.staging import Staging
from rv_distributed.storage import open_folder
from rv_distributed.versions import versions

_CARD_FILE = "README.md"
_MAX_CARD_BYTES = 1_000_000


class Reducer:
    """Collects the pieces of one output of a plan."""

    def __init__(self, plan: Plan, output: int, staging: Staging) -> None:
        self._plan = plan
        self._output = output
        self._staging = staging
        self._pieces: dict[int, tuple[SpanResult, ...]] = {}

    def add(self, piece: int, spans: tuple[SpanResult, ...]) -> None:
        """Take a finished piece's results."""
        self._pieces[piece] = spans

    def check_finite(self) -> None:
        """Raise NonFiniteError when the output holds NaN or infinity, RunError when a piece is missing."""
        check_finite(self._plan, self._staging.out, self._results[0])

    def commit(self, timings: Timings, pieces: Sequence[PieceRow], recipe: str) -> Manifest:
        """Write the small files, flush everything, publish, and return the manifest.

        ``pieces`` say who made what and when; ``recipe`` is the file that makes the output again.
        Raises RunError when a piece is missing, ChangedError when an input is no longer what the plan was made from,
        and OSError.
        """
        rows, totals = self._results
        self._write_scales()
        files = [self._write(TABLE_FILE, write_table(rows)), self._write(PIECES_FILE, write_pieces(pieces))]
        files.append(self._write(RECIPE_FILE, recipe.encode()))
        dtype, requantizes = (dict(self._plan.options)[option] for option in ("dtype", "requantize"))
        for sidecar in self._plan.sidecars:
            data = open_folder(sidecar.uri).read(sidecar.name)
            if sidecar.name == "config.json" and dtype != "auto":
                data = with_dtype(data, dtype)
            if sidecar.name == "config.json" and not requantizes and fp8_scheme(json.loads(data)) is not None:
                data = without_quantization(data)
            files.append(self._write(sidecar.name, data))
        if len(self._plan.shards) > 1:
            # By now all that it leads to is there.
            weight_map = {row.name: row.shard for row in rows}
            files.append(self._write(INDEX_FILE, build_index(weight_map, self._plan.data_bytes)))
        manifest = Manifest(
            operation=self._plan.operation,
            formula=formula(self._plan, self._output),
            inputs=tuple(
                InputEntry(item.role, item.uri, item.fingerprint, item.revision) for item in self._plan.inputs
            ),
            alphas=() if self._plan.operation == "extract" else self._plan.alphas[self._output],
            options=dict(self._plan.options),
            versions=versions(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            identity=identity_digest(self._staging.identity),
            shards=self._shards(rows),
            files=tuple(files),
            rules=tuple(RuleEntry(rule, what) for rule, what in self._plan.rules),
            left_out=tuple(LeftOut(name, why) for name, why in self._plan.left_out),
            files_left_out=tuple(FileLeftOut(name, why) for name, why in self._plan.files_left_out),
            totals=totals,
            timings=timings,
        )
        names = {item.uri: model_name(item.uri) for item in self._plan.inputs}
        card = self._write(_CARD_FILE, build_card(manifest, names, _license_of(self._plan.giver)).encode())
        manifest = manifest.with_file(card).sealed()
        # After all that was read of them, the small files of just now, too.
        check_unchanged(self._plan)
        self._staging.publish(manifest.to_json())
        return manifest

    def _write(self, name: str, data: bytes) -> FileEntry:
        self._staging.write(name, data)
        return FileEntry(name, len(data), blake3(data).hexdigest())

    @cached_property
    def _results(self) -> tuple[list[TensorRow], Totals]:
        """As `tensor_rows`. Raises RunError when a piece is missing."""
        missing = len(self._plan.pieces) - len(self._pieces)
        if missing:
            raise RunError(f"{missing} of {len(self._plan.pieces)} pieces were never finished; run again to continue")
        return tensor_rows(self._plan, self._output, self._pieces, self._scales)

    @cached_property
    def _scales(self) -> dict[int, bytes]:
        return scale_bytes(self._plan, self._pieces)

    def _write_scales(self) -> None:
        """Write the shards that hold the scales of requantized tensors."""
        for shard in self._plan.shards:
            if is_of_scales(shard, self._plan.tensors):
                scales = (self._scales.get(shard.first + number, b"") for number in range(shard.length))
                self._staging.write(shard.name, shard.header + b"".join(scales))

    def _shards(self, rows: list[TensorRow]) -> tuple[ShardEntry, ...]:
        entries = []
        for shard in self._plan.shards:
            parts = [part.digest for row in rows[shard.first : shard.first + shard.length] for part in row.parts]
            entries.append(ShardEntry(shard.name, shard.size, shard_digest(shard.header, parts)))
        return tuple(entries)


def check_unchanged(plan: Plan) -> None:
    """Raise ChangedError when an input file is not in the state in which the plan saw it, and OSError when its storage
    cannot tell."""
    for item in plan.inputs:
        folder = open_folder(item.uri)
        states = folder.states(file.name for file in item.files)
        for file in item.files:
            if states.get(file.name) != file.state:
                raise ChangedError(
                    f"{folder.path(file.name)} changed while it was read, so nothing was published. "
                    "Run again with --restart once the input is at rest."
                )


def formula(plan: Plan, output: int) -> str:
    """What an output is, in symbols; α where it depends on the tensor."""
    if plan.operation == "extract":
        return "V = A − B"
    numbered = plan.operation != "transfer"
    named = [_SYMBOLS[item.role] for item in plan.inputs if item.role in _SYMBOLS]
    alphas = plan.alphas[output]
    terms = [
        f"{_signed(alpha, number)}·{symbol.format(number if numbered else '')}"
        for number, (alpha, symbol) in enumerate(zip(alphas, named, strict=True), 1)
    ]
    total = " ".join(terms)
    options = dict(plan.options)
    divided, scale = options.get("normalize") == "true", options.get("scale", "1")
    if divided or scale != "1":
        factor = "λ·" if scale == "by tensor" else f"{scale}·" if scale != "1" else ""
        total = f"+ {factor}({total.removeprefix('+ ')}){' / Σα' if divided else ''}"
    return f"O = T {total}" if plan.has_target else f"O = {total.removeprefix('+ ')}"


#: Of the vectors, by the roles of their first inputs.
_SYMBOLS = {"vector": "V{0}", "donor": "(A{0} − B{0})", "model": "M{0}"}


def _signed(alpha: float | None, number: int) -> str:
    if alpha is None:
        return f"+ α{number}"
    return f"{'−' if alpha < 0 else '+'} {show_alpha(abs(alpha))}"


def _license_of(uri: str) -> dict[str, str]:
    """The licence in the metadata of a checkpoint's own model card, if it has one."""
    from yaml import YAMLError

    try:
        raw = open_folder(uri).read(_CARD_FILE, 0, _MAX_CARD_BYTES + 1)
        return license_fields(metadata_of(raw.decode("utf-8-sig"))) if len(raw) <= _MAX_CARD_BYTES else {}
    except (OSError, ValueError, RecursionError, YAMLError):
        return {}
