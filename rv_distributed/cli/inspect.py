"""``rv inspect``: what a checkpoint is, from its headers alone."""

from __future__ import annotations

import json as jsonlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rv_distributed.cli import options as opt
from rv_distributed.cli.terminal import say
from rv_distributed.errors import one_line
from rv_distributed.units import show_bytes, show_count

if TYPE_CHECKING:
    from rv_distributed.checkpoint.model import Checkpoint


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

    opened = open_checkpoint(checkpoint)
    say(jsonlib.dumps(_document(opened), indent=2) if json else _text(opened))


def _document(opened: Checkpoint) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "uri": opened.uri,
        "architectures": opened.config.get("architectures"),
        "model_type": opened.config.get("model_type"),
        "parameters": opened.parameters,
        "bytes": opened.weight_bytes,
        "dtypes": opened.dtypes,
        "fingerprint": opened.fingerprint,
        "revision": opened.revision,
        "shards": [{"name": file.name, "bytes": file.size} for file in opened.weight_files],
        "tensors": {
            name: {"dtype": t.dtype, "shape": list(t.shape), "file": t.file, "start": t.start, "stop": t.stop}
            for name, t in opened.tensors.items()
        },
        "sidecars": [file.name for file in opened.sidecars],
        "warnings": list(opened.warnings),
        "manifest": opened.manifest,
    }


def _text(opened: Checkpoint) -> str:
    architectures = opened.config.get("architectures")
    architecture = ", ".join(map(str, architectures)) if isinstance(architectures, list) else "unknown"
    dtypes = ", ".join(f"{name} {show_count(count)}" for name, count in opened.dtypes.items())
    rows = [
        ("checkpoint", opened.uri),
        ("model", f"{architecture} ({opened.config.get('model_type', 'no model_type')})"),
        ("parameters", f"{show_count(opened.parameters)} in {len(opened.tensors)} tensors ({dtypes})"),
        ("weights", f"{show_bytes(opened.weight_bytes)} in {len(opened.weight_files)} files"),
        *(("", f"{file.name}  {show_bytes(file.size)}") for file in opened.weight_files),
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
