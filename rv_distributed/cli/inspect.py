"""``rv inspect``: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import json as jsonlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rv_distributed.checkpoint.adapter import is_adapter
from rv_distributed.checkpoint.describe import decoding_of
from rv_distributed.checkpoint.sources import Gathered
from rv_distributed.cli import options as opt
from rv_distributed.cli.terminal import say
from rv_distributed.errors import MAX_REPORTED, one_line
from rv_distributed.units import show_bytes, show_count

if TYPE_CHECKING:
    from rv_distributed.checkpoint.model import Checkpoint, Tensor


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder, URI or name on the Hub.", metavar="CHECKPOINT")],
    json: opt.Json = False,
) -> None:
    """Show architecture, dtypes, parameters and shards of a checkpoint; for our outputs, how they were made.

    \b
    Examples:
      rv inspect models/instruct
      rv inspect out --json
    """
    from rv_distributed.opening import open_checkpoint
    from rv_distributed.plan import as_numbers

    opened = open_checkpoint(checkpoint)
    _, problems = as_numbers({"": opened})
    told = [*map(str, problems[:MAX_REPORTED]), *([f"… {len(problems)} of these"] * (len(problems) > MAX_REPORTED))]
    opened = replace(opened, warnings=(*opened.warnings, *told))
    if json:
        say(jsonlib.dumps(_document(opened), indent=2))
    else:
        say("\n\n".join(map(_text, opened.folders)))


def _document(opened: Checkpoint) -> dict[str, Any]:
    document = _document_of(opened)
    return document if opened.adapter is None else {**document, "adapter": _document_of(opened.adapter)}


def _document_of(opened: Checkpoint) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "status": "inspected",
        "uri": opened.uri,
        "architectures": opened.config.get("architectures"),
        "model_type": opened.config.get("model_type"),
        "parameters": opened.parameters,
        "bytes": opened.weight_bytes,
        "dtypes": opened.dtypes,
        "decoding": decoding_of(opened) or None,
        "fingerprint": opened.fingerprint,
        "revision": opened.revision,
        "shards": [{"name": file.name, "bytes": file.size} for file in opened.weight_files],
        "tensors": {name: _tensor(tensor) for name, tensor in opened.tensors.items()},
        "sidecars": [file.name for file in opened.sidecars],
        "left_out": [{"file": name, "why": why} for name, why in opened.left_out],
        "warnings": list(opened.warnings),
        "manifest": opened.manifest,
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    place = {"file": tensor.file, "start": tensor.start, "stop": tensor.stop}
    document = {"dtype": tensor.dtype, "shape": list(tensor.shape), **place}
    if isinstance(tensor.source, Gathered):
        document["parts"] = [
            {"file": os.path.basename(box.path), "start": box.offset, "index": box.starts, "shape": box.sizes}
            for box in tensor.source.boxes
        ]
    return document


def _text(opened: Checkpoint) -> str:
    architectures = opened.config.get("architectures")
    architecture = ", ".join(map(str, architectures)) if isinstance(architectures, list) else "unknown"
    dtypes = ", ".join(f"{name} {show_count(count)}" for name, count in opened.dtypes.items())
    model = ("model", f"{architecture} ({opened.config.get('model_type', 'no model_type')})")
    rows = [
        ("checkpoint", opened.uri),
        ("adapter of", str(opened.config.get("base_model_name_or_path") or "not said"))
        if is_adapter(opened)
        else model,
        ("parameters", f"{show_count(opened.parameters)} in {len(opened.tensors)} tensors ({dtypes})"),
        ("weights", f"{show_bytes(opened.weight_bytes)} in {len(opened.weight_files)} files"),
        *(("", f"{file.name}  {show_bytes(file.size)}") for file in opened.weight_files),
        *((("decoding", decoding),) if (decoding := decoding_of(opened)) else ()),
        ("sidecars", ", ".join(file.name for file in opened.sidecars) or "none"),
        ("fingerprint", opened.fingerprint),
    ]
    if opened.revision:
        rows.append(("revision", opened.revision))
    if opened.manifest is not None:
        rows += _made_by(opened.manifest)
    rows += [("warning", warning) for warning in opened.warnings]
    return "\n".join(f"{label:>11}  {one_line(text)}" for label, text in rows)


def _made_by(document: Any) -> list[tuple[str, str]]:
    from rv_distributed.checkpoint.manifest import ManifestError, manifest_from

    try:
        manifest = manifest_from(document)
    except ManifestError as error:
        return [("manifest", f"rv_manifest.json {error}")]
    rows = [("made as", f"{manifest.operation}: {manifest.formula}"), ("on", manifest.created)]
    rows += [(item.role, f"{item.uri}  {item.fingerprint}") for item in manifest.inputs]
    totals = manifest.totals
    measured = f"‖v‖ {totals.v_norm}, ‖t‖ {totals.t_norm}, max |v| {totals.v_max}, {totals.changed_elements} changed"
    return [*rows, ("measured", measured)]
