"""Whether an output may be made at a place in an object store, tried out before a run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress

from rv_distributed.checkpoint.manifest import MANIFEST_FILE
from rv_distributed.checkpoint.uris import is_remote, within
from rv_distributed.errors import Problem
from rv_distributed.storage import open_store
from rv_distributed.storage.objects import OWN_FOLDER, files_among, patiently, read_all
from rv_distributed.storage.protocols import ObjectStore
from rv_distributed.storage.replacing import strays
from rv_distributed.storage.uris import parse_store_uri


def object_place_problem(
    out: str, inputs: Iterable[str], differs: str, *, overwrite: bool, dry_run: bool
) -> Problem | None:
    """What is wrong with a place: it overlaps an input, holds an output already, which ``differs`` as it says, or
    something else, or cannot be written to.

    The last is found by writing a tiny object, which is removed again; not on a ``dry_run``, which writes nothing.
    """
    key = parse_store_uri(out).path
    if not key:
        return Problem(out, "is a whole bucket", "Give a folder in it as --out.")
    for uri in inputs:
        if is_remote(uri) and (within(uri, out) or within(out, uri)):
            return Problem(out, f"the output and the input {uri} overlap", "Give another --out.")
    try:
        store, _ = open_store(out)
        names = {found.key.removeprefix(f"{key}/") for found in patiently(lambda: list(store.list(f"{key}/")))}
        is_ours = MANIFEST_FILE in names or any(name.startswith(OWN_FOLDER) for name in names)
        if MANIFEST_FILE in names and not overwrite:
            return Problem(out, f"already exists{differs}", "Give another --out, or --overwrite to replace it.")
        if MANIFEST_FILE in names:
            manifest = read_all(store, f"{key}/{MANIFEST_FILE}")
            if found := strays(out, files_among(names), manifest):
                return found
        if names and not is_ours:
            return Problem(out, "holds objects that are no output of rv", "Give another --out, or remove them first.")
        if not dry_run:
            _try_out(store, f"{key}/{OWN_FOLDER}trial-{os.getpid()}-{secrets.token_hex(4)}")
    except OSError as error:
        what = f"cannot be written to: {error.strerror or error}"
        return Problem(out, what, "Check bucket, region, credentials and quota, or give another --out.")
    return None


def _try_out(store: ObjectStore, key: str) -> None:
    """Write, look for and remove a tiny object. Raises OSError."""
    patiently(lambda: store.put(key, b"tried by rv"))
    try:
        if not any(found.key == key for found in patiently(lambda: list(store.list(key)))):
            raise OSError(0, "an object that was just written is not there")
    finally:
        with suppress(FileNotFoundError):
            patiently(lambda: store.delete([key]))
