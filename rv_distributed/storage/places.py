"""Where outputs go: whether they may be made at the places asked for, and whether they fit there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.checkpoint.uris import is_remote, within
from rv_distributed.errors import OutputError, Problem, UsageError
from rv_distributed.storage.object_places import object_place_problem
from rv_distributed.storage.replacing import unreplaceable


def place_of(out: str) -> str:
    """The place that an output's name means: for a link, what it leads to, also where nothing is there yet. A link that
    leads to no place stays as it is, which `place_problems` tells."""
    if is_remote(out) or not os.path.islink(out) or _link_problem(out):
        return out
    return os.path.realpath(out)


def staging_folder(out: str) -> str:
    """Where the output ``out`` is made: beside it, so on the same file system."""
    parent, name = os.path.split(os.path.abspath(out))
    return os.path.join(parent, f".{name}.rv")


def place_problems(
    outs: Sequence[str],
    inputs: Iterable[Checkpoint],
    others: Mapping[str, str],
    *,
    overwrite: bool,
    dry_run: bool,
) -> list[Problem]:
    """What is wrong with the places of outputs: one that is a link to no place, exists (without ``overwrite``;
    ``others`` say how they differ), is none of ours, overlaps an input, or lies where nothing can be written, which a
    ``dry_run`` does not try out in a store.

    Raises UsageError when outputs lie in each other.
    """
    places = sorted(outs)
    for out, other in combinations(places, 2):
        if is_remote(out) == is_remote(other) and (
            within(other, out) if is_remote(out) else os.path.commonpath([out, other]) == out
        ):
            raise UsageError(f"--out: {other} lies in {out}; give each alpha a folder beside the others")
    inputs = list(inputs)
    local_inputs = [checkpoint for checkpoint in inputs if not is_remote(checkpoint.uri)]
    uris = [checkpoint.uri for checkpoint in inputs]
    found = (
        object_place_problem(out, uris, others.get(out, ""), overwrite=overwrite, dry_run=dry_run)
        if is_remote(out)
        else _place_problem(out, local_inputs, others.get(out, ""), overwrite)
        for out in places
    )
    return [problem for problem in found if problem is not None]


def _link_problem(out: str) -> Problem | None:
    """Why ``out``, if it is a link, leads to no place: in a circle, or into a folder that does not exist."""
    if not os.path.islink(out):
        return None
    place = os.path.realpath(out)
    if os.path.islink(place):
        return Problem(out, "is a link that leads in a circle", "Give another --out, or remove the link.")
    if not os.path.isdir(os.path.dirname(place)):
        what = f"is a link to {place}, and {os.path.dirname(place)} is no folder"
        return Problem(out, what, "Make that, give another --out, or remove the link.")
    return None


def _place_problem(out: str, inputs: Iterable[Checkpoint], differs: str, overwrite: bool) -> Problem | None:
    if nowhere := _link_problem(out):
        return nowhere
    for checkpoint in inputs:
        if _overlaps(out, checkpoint):
            return Problem(out, f"the output and the input {checkpoint.uri} overlap", "Give another --out.")
    kept = unreplaceable(out)
    if kept is not None and not overwrite:
        return replace(kept, what=f"already exists{differs}, and {kept.what}")
    if os.path.lexists(out) and not overwrite:
        return Problem(out, f"already exists{differs}", "Give another --out, or --overwrite to replace it.")
    if os.path.ismount(out):
        return Problem(out, "is a mount point, which no rename can replace", "Give a folder in it as --out.")
    if kept is not None:
        return kept
    parent = _existing_parent(out)
    if not os.path.isdir(parent):
        return Problem(out, f"{parent} is no folder", "Give another --out.")
    if not os.access(parent, os.W_OK | os.X_OK):
        return Problem(out, f"{parent} cannot be written to", "Give another --out, or change its permissions.")
    return None


def _overlaps(out: str, checkpoint: Checkpoint) -> bool:
    real, real_input = os.path.realpath(out), os.path.realpath(checkpoint.uri)
    if _holds(real_input, real):
        return True
    # What the run replaces or clears must hold no file of an input, not even one that links lead to.
    files = (os.path.join(checkpoint.uri, file.name) for file in checkpoint.weight_files + checkpoint.sidecars)
    folders = {real_input, *(os.path.dirname(os.path.realpath(file)) for file in files)}
    return any(_holds(own, folder) for own in (real, os.path.realpath(staging_folder(out))) for folder in folders)


def _holds(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _existing_parent(path: str) -> str:
    parent = os.path.dirname(path)
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    return parent


class Room(NamedTuple):
    """What a run needs of one file system, and what is there."""

    folder: str
    """Where the file system is mounted."""
    needed: int
    """Bytes of all outputs that go there."""
    free: int
    """Bytes, with those that an unfinished run has reserved for the same outputs."""


def rooms(outs: Sequence[str], bytes_each: int) -> tuple[Room, ...]:
    """The file systems that outputs of ``bytes_each`` go to."""
    found: dict[int, Room] = {}
    for out in outs:
        parent = _existing_parent(out)
        device = os.stat(parent).st_dev
        room = found.get(device) or Room(_mount_point(parent), 0, shutil.disk_usage(parent).free)
        found[device] = room._replace(needed=room.needed + bytes_each, free=room.free + _held(staging_folder(out)))
    return tuple(found.values())


def _mount_point(folder: str) -> str:
    folder = os.path.realpath(folder)
    while not os.path.ismount(folder):
        folder = os.path.dirname(folder)
    return folder


def _held(folder: str) -> int:
    held = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # another run may be at work there
                held += os.stat(os.path.join(parent, name)).st_blocks * 512
    return held


def check_rooms(found: Iterable[Room]) -> None:
    """Raise OutputError, naming every file system that is too small for what goes there."""
    small = [room for room in found if room.needed > room.free]
    if small:
        what = "; ".join(
            f"{room.folder}: the outputs there take {room.needed} bytes, {room.free} are free" for room in small
        )
        raise OutputError(f"{what}. Free some space, or give another --out.")
