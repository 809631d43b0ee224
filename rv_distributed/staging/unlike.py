"""In what an output that is there is not the one that a command asks for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, Manifest, manifest_from
from rv_distributed.checkpoint.uris import is_remote, join
from rv_distributed.errors import RvError
from rv_distributed.identity import difference, identity_digest, identity_in
from rv_distributed.storage import open_folder


def unlike(out: str, identity: Mapping[str, Any]) -> str:
    """What keeps the output at ``out`` from being the one that ``identity`` describes, as the end of a sentence on it;
    empty where that is no output of ours, or nothing does."""
    try:
        folder = open_folder(out)
        manifest = manifest_from(json.loads(folder.read(MANIFEST_FILE)))
        sizes = {file.name: file.size for file in folder.files()}
    except (OSError, ValueError, RecursionError, RvError):
        return ""
    if manifest.identity != identity_digest(identity):
        otherwise = next(_written_since(manifest, identity), "other files of an input")
        told = difference(identity_in(manifest, identity), identity, otherwise)
        return f", made with other inputs, options or versions ({told})"
    for name, nbytes in manifest.sizes.items():
        if sizes.get(name) != nbytes:
            what = f"has {sizes[name]} bytes instead of {nbytes}" if name in sizes else "is missing"
            return f", but its {name} {what}"
    return ""


def _written_since(manifest: Manifest, identity: Mapping[str, Any]) -> Iterator[str]:
    """Files of the inputs that are newer than the output. It does not tell their states, only a digest of all."""
    try:
        made = datetime.fromisoformat(manifest.created).timestamp() + 1  # it is told in whole seconds
    except (ValueError, OverflowError):
        return  # any text may stand there
    for item in identity["inputs"].values():
        for path in (join(item["uri"], name) for name in item["files"] if not is_remote(item["uri"])):
            with suppress(OSError):
                if os.path.getmtime(path) > made:
                    yield f"{path} was written since"
