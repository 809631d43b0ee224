"""From named checkpoints to a job: open and check every input, plan, and look at the places of the outputs.

All that ``--dry-run`` needs; `Job.run` does the work.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

from rv_distributed.checkpoint.manifest import Manifest
from rv_distributed.checkpoint.model import Checkpoint, all_folders
from rv_distributed.checkpoint.sidecars import sidecars_of
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import InputError, OutputError, Problem, UsageError
from rv_distributed.identity import identity_of
from rv_distributed.job import Job
from rv_distributed.opening import open_checkpoint, same_weights
from rv_distributed.plan import WHOLE_SHARDS, Plan, PlanOptions, make_plan, misfits, no_difference, role_problems
from rv_distributed.pushing import hub_target, local_stage, push_problem
from rv_distributed.recipe import Recipe
from rv_distributed.runtime.select import RunOptions, choose_runtime, expected_shape
from rv_distributed.runtime.sizing import size_worker
from rv_distributed.staging import published, unlike
from rv_distributed.storage import HUB, PosixFolder, open_folder, resolve_output
from rv_distributed.storage.places import place_of, place_problems


def prepare(
    recipe: Recipe, outs: Sequence[str], plan_options: PlanOptions, run_options: RunOptions, *, dry_run: bool = False
) -> Job:
    """Open and check every input, and plan the run. Writes nothing, but a tiny object where an output goes to a store,
    which is removed again; with ``dry_run`` not even that.

    ``outs`` are the output folders, one for each row of ``recipe.alphas``. Raises UsageError, InputError
    with the problems of all inputs, and OutputError.
    """
    if len(outs) != len(recipe.alphas):
        raise UsageError("give each alpha an output of its own")
    outs = [resolve_output(out) for out in outs]
    pushes = {number: hub_target(out) for number, out in enumerate(outs) if out.startswith(HUB)}
    outs = [local_stage(pushes[number]) if number in pushes else place_of(out) for number, out in enumerate(outs)]
    if any(map(is_remote, outs)):
        # There a piece cannot begin in the middle of a file.
        plan_options = replace(plan_options, piece_bytes=WHOLE_SHARDS)
    with _collector_paused():
        opened, problems = _open_all(recipe, tokenizer=plan_options.needs_tokenizers)
        plan = None
        if problems:
            readable = [opened[name] for name in recipe.inputs if name in opened]
            problems += misfits(readable, plan_options)
        else:
            problems += role_problems(recipe, opened)
            problems += _whole_problems(recipe, opened, recipe.giver(plan_options.sidecars_from))
            try:
                plan = make_plan(recipe, opened, plan_options)
            except InputError as error:
                problems += error.problems
    # Tokenizers are for the plan alone, and not small enough to be kept through a run.
    opened = {name: replace(checkpoint, tokenizer=None) for name, checkpoint in opened.items()}
    complete, others = _there(plan, outs, run_options) if plan is not None else ({}, {})
    unmade = [out for number, out in enumerate(outs) if number not in complete]
    inputs = all_folders(opened.values())
    places = place_problems(unmade, inputs, others, overwrite=run_options.overwrite, dry_run=dry_run)
    places += [problem for problem in map(push_problem, pushes.values()) if problem is not None]
    if problems or plan is None:
        raise InputError(dict.fromkeys([*problems, *places]))
    if places:
        raise OutputError(" ".join(map(str, places)))
    runtime = choose_runtime(run_options)
    shape = expected_shape(run_options, runtime)
    sizing = size_worker(plan, run_options, runtime, shape, remote_outputs=sum(map(is_remote, outs)))
    return Job(recipe, plan_options, opened, plan, tuple(outs), pushes, complete, run_options, runtime, sizing)


def _there(plan: Plan, outs: Sequence[str], options: RunOptions) -> tuple[dict[int, Manifest], dict[str, str]]:
    """The outputs that an earlier run of the same plan has published, by number, with their manifests; and of those
    that are others, how they differ."""
    complete, others = dict[int, Manifest](), dict[str, str]()
    for number, out in enumerate(outs):
        if (options.overwrite and options.restart) or not (is_remote(out) or os.path.lexists(out)):
            continue
        identity = identity_of(plan, number)
        if manifest := published(out, identity, overwrite=options.overwrite):
            complete[number] = manifest
        elif not options.overwrite:
            others[out] = unlike(out, identity)
    return complete, others


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Headers and plans of large models are hundreds of thousands of small objects that all stay: looking
    through them for garbage again and again would take as long as making them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open_all(recipe: Recipe, *, tokenizer: bool) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """The checkpoints that could be opened, by the recipe's names for them, and what is wrong with the others."""

    def load(uri: str) -> Checkpoint | InputError:
        try:
            return open_checkpoint(uri, tokenizer=tokenizer)
        except InputError as error:
            return error

    unique = list(dict.fromkeys([recipe.frame, *(name for _, name in recipe.roles)]))
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    with ThreadPoolExecutor(len(unique)) as pool:
        for uri, result in zip(unique, pool.map(load, unique), strict=True):
            if isinstance(result, InputError):
                problems += result.problems
            else:
                opened[uri] = result
    return opened, problems


def _whole_problems(recipe: Recipe, opened: Mapping[str, Checkpoint], giver: str) -> list[Problem]:
    """What is wrong with files that the plan does not look into: donors that are their reference, and small files
    that would be copied from elsewhere or cannot be read."""
    problems = []
    for vector in (recipe.vectors[number] for number in recipe.used):
        plus, minus = opened[vector.plus], opened[vector.minus] if vector.minus is not None else None
        try:
            if minus is not None and same_weights(plus, minus):
                problems.append(no_difference(plus, minus))
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
            problems.append(Problem(str(error.filename or plus.uri), what, "Check its storage."))
    for checkpoint, sidecar in sidecars_of(opened[recipe.frame], opened[giver]):
        folder = open_folder(checkpoint.uri)
        if not isinstance(folder, PosixFolder):
            continue  # only file systems have links, and permissions of single files
        path = folder.path(sidecar.name)
        if elsewhere := folder.leads_elsewhere(sidecar.name):
            what = f"is a link to {elsewhere}, outside of the checkpoint, and would be copied into the output"
            problems.append(
                Problem(path, what, "Put the file itself there if it belongs to the model; else remove it.")
            )
        elif not os.access(path, os.R_OK):
            problems.append(Problem(path, "cannot be read: Permission denied", "Change its permissions."))
    return problems
