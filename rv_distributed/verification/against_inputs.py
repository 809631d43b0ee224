"""Checking a finished output against the inputs that its manifest records: it is planned and computed anew.

`verify` comes first and says whether the output is still what was written; this says whether what was written
is what the inputs give.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from blake3 import blake3

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, RECIPE_FILE, InputEntry, Manifest
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.errors import Finding, InputError, Problem, UsageError, VerifyError
from rv_distributed.opening import open_checkpoint
from rv_distributed.plan import Piece, Plan, PlanOptions, make_plan, task_of
from rv_distributed.recipe import Recipe
from rv_distributed.storage import Folder
from rv_distributed.verification.output import VerifyProgress, open_output, read_file

#: Smaller than those of a run, so that a sample is spread over more places.
_PIECE_BYTES: Final = 8 << 20
_WHAT_DIFFERS: Final = (
    "is not what the inputs give: this output was damaged, or an input changed where its fingerprint does not look"
)


class Recomputed(NamedTuple):
    """What was computed anew and found equal."""

    manifest: Manifest
    pieces: int
    pieces_total: int
    bytes: int


def verify_against_inputs(uri: str, *, sample: float = 1.0, progress: VerifyProgress | None = None) -> Recomputed:
    """Compute a share of an output again from its recorded inputs and compare every bit; writes nothing.

    ``sample`` is the share of the pieces; which ones is decided by the manifest's digest, so a second call takes
    the same. Raises UsageError for a share outside of 0 to 1; InputError when an input is gone, cannot be read or
    has another fingerprint than the one recorded, or when the folder holds no manifest of ours; VerifyError with
    every difference; RunError when storage fails in between.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"--sample: a share lies between 0 and 1, not {sample}")
    folder, manifest, findings = open_output(uri)
    if findings:
        raise VerifyError(folder.uri, findings)
    recipe, options = _recipe_of(folder, manifest)
    plan = make_plan(recipe, _open_inputs(manifest.inputs), options)
    alphas = () if plan.operation == "extract" else plan.alphas[0]
    if (plan.operation, dict(plan.options), alphas) != (manifest.operation, manifest.options, manifest.alphas):
        raise VerifyError(folder.uri, [Finding(MANIFEST_FILE, f"states other options or alphas than {RECIPE_FILE}")])
    if [(shard.name, shard.size) for shard in plan.shards] != [(shard.name, shard.bytes) for shard in manifest.shards]:
        raise VerifyError(folder.uri, [Finding(MANIFEST_FILE, "lists other shards than the inputs give")])
    pieces = _sampled(plan.pieces, sample, manifest.digest)
    findings = _compare(plan, pieces, folder.uri, progress)
    if findings:
        raise VerifyError(folder.uri, findings)
    return Recomputed(manifest, len(pieces), len(plan.pieces), sum(piece.stop - piece.start for piece in pieces))


def _recipe_of(folder: Folder, manifest: Manifest) -> tuple[Recipe, PlanOptions]:
    """What an output was made by, from the recipe beside it. Raises VerifyError when that is not what was written."""
    # pydantic is imported for it.
    from rv_distributed.recipe_files.reading import load_recipe

    if RECIPE_FILE not in {file.name for file in folder.files()}:
        raise VerifyError(folder.uri, [Finding(RECIPE_FILE, "is missing")])
    digests = {file.name: file.digest for file in manifest.files}
    try:
        if blake3(read_file(folder, RECIPE_FILE)).hexdigest() != digests.get(RECIPE_FILE):
            raise VerifyError(folder.uri, [Finding(RECIPE_FILE, "differs from what was written")])
        loaded = load_recipe(folder.path(RECIPE_FILE))
    except InputError as error:
        raise VerifyError(folder.uri, [Finding(RECIPE_FILE, problem.what) for problem in error.problems]) from error
    inputs = set(map(_name, _grouped(manifest.inputs)))
    if set(loaded.recipe.inputs) - inputs or len(loaded.recipe.alphas) != 1:
        raise VerifyError(folder.uri, [Finding(RECIPE_FILE, "is not of the inputs in the manifest")])
    return loaded.recipe, replace(loaded.plan_options, piece_bytes=_PIECE_BYTES)


def _grouped(entries: Sequence[InputEntry]) -> list[list[InputEntry]]:
    """The inputs, each with its adapter."""
    groups: list[list[InputEntry]] = []
    for entry in entries:
        if entry.role == "adapter" and groups:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _name(group: Sequence[InputEntry]) -> str:
    """What a base and its adapter are opened as."""
    return "+".join(entry.uri for entry in group)


def _open_inputs(entries: Sequence[InputEntry]) -> dict[str, Checkpoint]:
    """The inputs by their names, without tokenizers: what may be added was decided before the run.

    Raises InputError with all that are gone or were changed.
    """
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    for name, group in {_name(group): group for group in _grouped(entries)}.items():
        try:
            opened[name] = open_checkpoint(name)
        except InputError as error:
            problems += error.problems
            continue
        for entry, folder in zip(group, opened[name].folders, strict=False):
            if folder.fingerprint != entry.fingerprint:
                what = f"has changed since the output was made of it ({entry.role}): its fingerprint is another"
                remedy = "Put back what it was; without --against-inputs, verify needs no inputs."
                problems.append(Problem(entry.uri, what, remedy))
    if problems:
        raise InputError(problems)
    return opened


def _sampled(pieces: Sequence[Piece], sample: float, seed: str) -> list[Piece]:
    """A share of the pieces, at least one, in file order."""
    count = math.ceil(len(pieces) * sample)
    chosen = random.Random(seed).sample(range(len(pieces)), count)  # noqa: S311 - no secret
    return [pieces[number] for number in sorted(chosen)]


def _compare(plan: Plan, pieces: Sequence[Piece], output: str, progress: VerifyProgress | None) -> list[Finding]:
    from rv_distributed.runtime.dry import dry_config
    from rv_distributed.runtime.recompute import recompute

    config = dry_config(plan, output=output, stats="none")
    total, done = sum(piece.stop - piece.start for piece in pieces), 0
    findings = []
    tasks = (task_of(plan, piece) for piece in pieces)
    for piece, differences in zip(pieces, recompute(tasks, config), strict=True):
        findings += [Finding(d.shard, _WHAT_DIFFERS, d.tensor, d.start, d.stop) for d in differences]
        done += piece.stop - piece.start
        if progress is not None:
            progress(done, total)
    return findings
