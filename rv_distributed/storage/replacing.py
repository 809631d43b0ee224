"""Whether what lies at an output's place may be replaced: only an output of ours, with nothing else in it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from typing import Final

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, ManifestError, names_in
from rv_distributed.errors import Problem

_REMEDY: Final = "Give another --out, or move it away yourself."
#: Folders that libraries and notebooks leave beside the files that they load, push or show.
_CACHES: Final = ("__pycache__", ".cache", ".ipynb_checkpoints")
#: Files that macOS, Windows and NFS make in any folder by themselves.
_OF_SYSTEMS: Final = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs.*", re.DOTALL)


def unreplaceable(out: str) -> Problem | None:
    """Why what lies at the path ``out``, if anything, is not ours to replace."""
    if not os.path.lexists(out):
        return None
    if not os.path.isdir(out):
        return Problem(out, "is no folder, so --overwrite leaves it alone", _REMEDY)
    try:
        if not os.listdir(out):
            return None
        with open(os.path.join(out, MANIFEST_FILE), "rb") as file:
            return strays(out, list(_names(out)), file.read())
    except (FileNotFoundError, IsADirectoryError):
        return Problem(out, "is no output of rv, so --overwrite leaves it alone", _REMEDY)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        return Problem(str(error.filename or out), what, "Change its permissions, or give another --out.")


def strays(out: str, names: Collection[str], manifest: bytes) -> Problem | None:
    """That an output with this manifest, whose files are ``names``, holds others than its own, if it does."""
    try:
        found = set(names) - names_in(manifest)
    except ManifestError:
        what = f"has a {MANIFEST_FILE} that cannot be read, so nothing tells which files in it are the output's"
        return Problem(out, what, _REMEDY)
    if not found:
        return None
    what = f"holds what is not of the output, and --overwrite would delete: {some_of(found)}"
    return Problem(out, what, "Move that away, or give another --out.")


def some_of(names: Collection[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(sorted(names)[:3])}{more}"


def _names(folder: str) -> Iterator[str]:
    """All files and links below a folder, without caches and what systems put there. Raises OSError."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                if not _OF_SYSTEMS.fullmatch(entry.name):
                    yield entry.name
            elif entry.name not in _CACHES:
                yield from (f"{entry.name}/{name}" for name in _names(entry.path))
