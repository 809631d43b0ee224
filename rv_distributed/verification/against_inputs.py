"""Checking a finished output against the inputs that its manifest records: it is planned and computed anew.

`verify` comes first and says whether the output is still what was written; this says whether what was written
is what the inputs give.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Final, NamedTuple

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, InputEntry, Manifest
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.errors import Finding, InputError, Problem, UsageError, VerifyError
from rv_distributed.opening import open_checkpoint
from rv_distributed.plan import Piece, Plan, PlanOptions, make_plan, task_of
from rv_distributed.recipe import Operation, Recipe, Vector
from rv_distributed.runtime.model import WorkerConfig
from rv_distributed.runtime.select import usable_cpus
from rv_distributed.runtime.sizing import DEFAULT_BUDGET_BYTES, size_buffers
from rv_distributed.verification.output import VerifyProgress, open_output

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
    every difference; PieceError when storage fails in between.
    """
    if not 0 < sample <= 1:
        raise UsageError(f"--sample: a share lies between 0 and 1, not {sample}")
    folder, manifest, findings = open_output(uri)
    if findings:
        raise VerifyError(folder.uri, findings)
    try:
        recipe, options = _recipe_of(manifest), _options_of(manifest)
    except (UsageError, KeyError, ValueError) as error:
        raise VerifyError(folder.uri, [Finding(MANIFEST_FILE, f"does not say what was computed: {error}")]) from error
    plan = make_plan(recipe, _open_inputs(manifest.inputs), options)
    if [(shard.name, shard.size) for shard in plan.shards] != [(shard.name, shard.bytes) for shard in manifest.shards]:
        raise VerifyError(folder.uri, [Finding(MANIFEST_FILE, "lists other shards than the inputs give")])
    pieces = _sampled(plan.pieces, sample, manifest.digest)
    findings = _compare(plan, pieces, folder.uri, progress)
    if findings:
        raise VerifyError(folder.uri, findings)
    return Recomputed(manifest, len(pieces), len(plan.pieces), sum(piece.stop - piece.start for piece in pieces))


def _recipe_of(manifest: Manifest) -> Recipe:
    """The recipe that an output was made by. Raises UsageError when its inputs do not make one."""
    operation: Operation = manifest.operation  # type: ignore[assignment]  # checked when it was read
    named = [(entries[0].role, _name(entries)) for entries in _grouped(manifest.inputs)]
    target = named.pop(0)[1] if named and named[0][0] == "target" else None
    vectors = []
    while named:
        role, uri = named.pop(0)
        if role == "vector":
            vectors.append(Vector(uri))
        elif role == "donor" and named and named[0][0] == "reference":
            vectors.append(Vector(uri, named.pop(0)[1]))
        else:
            raise UsageError(f"the input {uri} is a {role} at an odd place")
    if (target is None) != (operation == "extract"):
        raise UsageError(f"the inputs are not those of {operation}")
    return Recipe(operation, target, tuple(vectors), (manifest.alphas if target is not None else (1.0,),))


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


def _options_of(manifest: Manifest) -> PlanOptions:
    recorded = manifest.options
    return PlanOptions(
        dtype=recorded["dtype"],
        max_shard_bytes=int(recorded["max_shard_bytes"]),
        include=recorded["include"] or None,
        exclude=recorded["exclude"] or None,
        piece_bytes=_PIECE_BYTES,
        rounding=recorded["rounding"],  # type: ignore[arg-type]  # checked by the options themselves
        seed=int(recorded["seed"]),
        compute_dtype=recorded["compute_dtype"],  # type: ignore[arg-type]  # likewise
        requantize=bool(recorded["requantize"]),
    )


def _open_inputs(entries: Sequence[InputEntry]) -> dict[str, Checkpoint]:
    """The inputs by their names. Raises InputError with all that are gone or were changed."""
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
    from rv_distributed.runtime.recompute import recompute

    sizing = size_buffers(plan, streams=min(16, 2 * usable_cpus()), budget_bytes=DEFAULT_BUDGET_BYTES)
    config = WorkerConfig(
        outputs=(output,),
        alphas=plan.alphas,
        device="cpu",
        streams=sizing.streams,
        cpus=usable_cpus(),
        chunk_bytes=sizing.chunk_bytes,
        stats="none",
        arithmetic=plan.arithmetic,
    )
    total, done = sum(piece.stop - piece.start for piece in pieces), 0
    findings = []
    tasks = (task_of(plan, piece) for piece in pieces)
    for piece, differences in zip(pieces, recompute(tasks, config), strict=True):
        findings += [Finding(d.shard, _WHAT_DIFFERS, d.tensor, d.start, d.stop) for d in differences]
        done += piece.stop - piece.start
        if progress is not None:
            progress(done, total)
    return findings
