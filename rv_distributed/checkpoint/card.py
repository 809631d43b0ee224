"""The model card of an output: ``README.md`` with the Hub's metadata, and what was computed from what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from rv_distributed.checkpoint.manifest import Manifest
from rv_distributed.checkpoint.uris import last_part
from rv_distributed.errors import one_line, redacted

TAGS: Final = ("merge", "task-arithmetic", "reasoning-vector")
_KINDS: Final = {"extract": "A reasoning vector", "linear": "A weighted sum of models"}
_METADATA: Final = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_CACHE_FOLDER: Final = re.compile(r"/models--([^/]+)/snapshots/")


def model_name(uri: str) -> str:
    """The Hub id of a checkpoint in the Hub's cache; else its folder's name. (config.json's ``_name_or_path`` is
    often that of the model that training began with.)"""
    if cached := _CACHE_FOLDER.search(uri + "/"):
        return cached[1].replace("--", "/", 1)
    if uri.startswith("hf://"):
        return "/".join(uri.removeprefix("hf://").partition("@")[0].split("/")[:2])
    return last_part(uri)


def metadata_of(card: str) -> Mapping[str, Any]:
    """The metadata at the top of a model card; empty when it has none. Raises `yaml.YAMLError`."""
    import yaml

    block = _METADATA.match(card)
    metadata = yaml.safe_load(block[1]) if block else None
    return metadata if isinstance(metadata, dict) else {}


def license_fields(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What a card's metadata says of the licence; the Hub reads a licence called ``other`` in the last two."""
    fields = ((name, metadata.get(name)) for name in ("license", "license_name", "license_link"))
    return {name: redacted(value) for name, value in fields if isinstance(value, str)}


def build_card(manifest: Manifest, names: Mapping[str, str], licence: Mapping[str, str]) -> str:
    """The card as Markdown; ``names`` gives a model name for the URI of every input, ``licence`` is the
    `license_fields` of the model whose files go with the output."""
    import yaml

    names = {uri: one_line(" ".join(name.splitlines())) for uri, name in names.items()}
    base_models = list(dict.fromkeys(names[item.uri] for item in manifest.inputs))
    # Written with yaml itself: importing huggingface_hub for it would take a fifth of a second of every run.
    metadata = {"base_model": base_models, "library_name": "transformers", **licence, "tags": list(TAGS)}
    kind = _KINDS.get(manifest.operation, "A model with a reasoning vector added")
    rows = [
        f"| {item.role} | {as_markdown(names[item.uri])} | {item.revision or ''} | `{item.fingerprint[:23]}…` |"
        for item in manifest.inputs
    ]
    totals = manifest.totals
    return "\n".join(
        [
            "---",
            yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).rstrip("\n"),
            "---",
            "",
            f"# {kind}",
            "",
            "Made by weight arithmetic with rv_distributed, without training:",
            "",
            f"    {manifest.formula}",
            "",
            "| role | model | revision | fingerprint |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            f"{totals.combined} of {totals.tensors} tensors were computed in {_arithmetic(manifest.options)}; "
            f"{totals.copied} were copied and {totals.cast} cast. Method: arXiv 2509.01363; task arithmetic: "
            "arXiv 2212.04089. `rv_manifest.json` holds digests of every file, `rv_tensors.parquet` a row for "
            "every tensor.",
            "",
        ]
    )


def _arithmetic(options: Mapping[str, str]) -> str:
    how = f"stochastically with seed {options['seed']}" if options["rounding"] == "stochastic" else "to nearest"
    return f"{options['compute_dtype']} and rounded once, {how}"


def as_markdown(text: str) -> str:
    """Text from files is shown, never interpreted."""
    return re.sub(r"([\\`*_{}\[\]<>|#!&~])", r"\\\1", text)
