"""A run, from named checkpoints to published outputs: open, plan, run, commit.

`prepare` opens and checks every input and makes the plan, which is all that ``--dry-run`` needs;
`Job.run` does the work.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from rv_distributed.checkpoint.distributed import METADATA_FILE
from rv_distributed.checkpoint.manifest import Manifest, Timings
from rv_distributed.checkpoint.model import Checkpoint, all_folders
from rv_distributed.checkpoint.pieces import PieceRow
from rv_distributed.checkpoint.sidecars import sidecars_of
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import Cancelled, InputError, OutputError, PieceError, Problem, RunError, UsageError
from rv_distributed.identity import identity_of
from rv_distributed.opening import open_checkpoint, same_weights
from rv_distributed.plan import WHOLE_SHARDS, PieceTask, Plan, PlanOptions, make_plan, misfits, task_of
from rv_distributed.pushing import hub_target, local_stage, push_folder, push_problem
from rv_distributed.recipe import Recipe
from rv_distributed.reduce import Reducer, check_unchanged
from rv_distributed.results import piece_rows
from rv_distributed.runtime.model import PieceResult, Runtime, WorkerConfig, WorkerShape
from rv_distributed.runtime.select import (
    MOST_CPUS_BESIDE_GPU,
    ChosenRuntime,
    RunOptions,
    choose_runtime,
    may_have_gpus,
    usable_cpus,
)
from rv_distributed.runtime.sizing import DEFAULT_BUDGET_BYTES, Sizing, bytes_to_read, size_buffers
from rv_distributed.staging import Record, Staging, open_staging, published, tidy
from rv_distributed.storage import HUB, PosixFolder, open_folder, resolve_output
from rv_distributed.storage.places import Room, check_rooms, place_problems, rooms
from rv_distributed.storage.publish import remove
from rv_distributed.storage.uris import HubUri
from rv_distributed.watching import ProgressCallback, Watch

#: While some wait for the storage, there are enough others for the processors.
_STREAMS_OF_CPU: Final = 3
#: Of one process: its interpreter serves no more.
_MOST_STREAMS: Final = 24


def prepare(recipe: Recipe, outs: Sequence[str], plan_options: PlanOptions, run_options: RunOptions) -> Job:
    """Open and check every input, and plan the run. Writes nothing.

    ``outs`` are the output folders, one for each row of ``recipe.alphas``. Raises UsageError, InputError
    with the problems of all inputs, and OutputError.
    """
    if len(outs) != len(recipe.alphas):
        raise UsageError("give each alpha an output of its own")
    outs = [resolve_output(out) for out in outs]
    pushes = {number: hub_target(out) for number, out in enumerate(outs) if out.startswith(HUB)}
    outs = [local_stage(pushes[number]) if number in pushes else out for number, out in enumerate(outs)]
    if any(map(is_remote, outs)):
        # There a piece cannot begin in the middle of a file.
        plan_options = replace(plan_options, piece_bytes=WHOLE_SHARDS)
    with _collector_paused():
        opened, problems = _open_all(recipe, vocabulary=plan_options.needs_vocabularies)
        plan = None
        if problems:
            readable = [opened[name] for name in recipe.inputs if name in opened]
            problems += misfits(readable, plan_options)
        else:
            problems += _whole_problems(recipe, opened, recipe.giver(plan_options.sidecars_from))
            try:
                plan = make_plan(recipe, opened, plan_options)
            except InputError as error:
                problems += error.problems
    complete = _complete(plan, outs, run_options) if plan is not None else {}
    unmade = [out for number, out in enumerate(outs) if number not in complete]
    places = place_problems(unmade, all_folders(opened.values()), overwrite=run_options.overwrite)
    places += [problem for problem in map(push_problem, pushes.values()) if problem is not None]
    if problems or plan is None:
        raise InputError([*problems, *places])
    if places:
        raise OutputError(" ".join(map(str, places)))
    runtime = choose_runtime(run_options)
    sizing = _sized(plan, outs, run_options, runtime, _expected_shape(run_options, runtime))
    return Job(recipe, plan_options, opened, plan, tuple(outs), pushes, complete, run_options, runtime, sizing)


def _complete(plan: Plan, outs: Sequence[str], options: RunOptions) -> dict[int, Manifest]:
    """The outputs that an earlier run of the same plan has published: by number, with their manifests."""
    if options.overwrite and options.restart:
        return {}
    found = {
        number: published(out, identity_of(plan, number), overwrite=options.overwrite)
        for number, out in enumerate(outs)
        if is_remote(out) or os.path.lexists(out)
    }
    return {number: manifest for number, manifest in found.items() if manifest is not None}


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


def _open_all(recipe: Recipe, *, vocabulary: bool) -> tuple[dict[str, Checkpoint], list[Problem]]:
    """The checkpoints that could be opened, by the recipe's names for them, and what is wrong with the others."""

    def load(uri: str) -> Checkpoint | InputError:
        try:
            return open_checkpoint(uri, vocabulary=vocabulary)
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
                what = (
                    f"is the donor and holds the same weights as the reference, {minus.uri}: the vector would be zero"
                )
                problems.append(Problem(plus.uri, what, "Give two different checkpoints as --donor and --reference."))
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


def _check(cancel: threading.Event) -> None:
    if cancel.is_set():
        raise Cancelled("stopped by its caller; the same call resumes")


def _expected_shape(options: RunOptions, runtime: ChosenRuntime) -> WorkerShape:
    """What a worker has, as far as can be said before there is one."""
    has_gpu = options.device == "cuda"
    if runtime == "local":
        return WorkerShape(usable_cpus(), has_gpu or (options.device == "auto" and may_have_gpus()))
    return WorkerShape(options.cpus_per_worker or (MOST_CPUS_BESIDE_GPU if has_gpu else 1), has_gpu)


def _sized(plan: Plan, outs: Sequence[str], options: RunOptions, runtime: ChosenRuntime, shape: WorkerShape) -> Sizing:
    """The buffers of a worker of some shape."""
    streams = min(_MOST_STREAMS, _STREAMS_OF_CPU * shape.cpus)
    if runtime == "local" and options.workers is not None:
        streams = options.workers
    return size_buffers(
        plan,
        streams=streams,
        budget_bytes=DEFAULT_BUDGET_BYTES if options.memory_budget_bytes is None else options.memory_budget_bytes,
        remote_outputs=sum(map(is_remote, outs)),
        has_gpu=shape.has_gpu,
    )


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is checked, planned and ready."""

    recipe: Recipe
    plan_options: PlanOptions
    opened: Mapping[str, Checkpoint]
    """The inputs, by the names that the recipe gives them."""
    plan: Plan
    outs: tuple[str, ...]
    """Absolute paths or URIs, one an output."""
    pushes: Mapping[int, HubUri]
    """Where on the Hub outputs go afterwards, by number; then they are removed here."""
    complete: Mapping[int, Manifest]
    """Outputs that an earlier run of the same command has published, by number: there is nothing to do for them."""
    options: RunOptions
    runtime: ChosenRuntime
    sizing: Sizing
    """The buffers that a worker is expected to have; known better once the runtime is there."""

    @property
    def todo(self) -> tuple[int, ...]:
        """The numbers of the outputs that are to be made."""
        return tuple(number for number in range(len(self.outs)) if number not in self.complete)

    @property
    def bytes_in(self) -> int:
        """Bytes of tensor data that the run reads."""
        return bytes_to_read(self.plan) if self.todo else 0

    @property
    def bytes_out(self) -> int:
        """Bytes of shards that the run writes, in all outputs."""
        return self.plan.output_bytes * len(self.todo)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the inputs but does not stop the run."""
        found = [warning for checkpoint in self.opened.values() for warning in checkpoint.warnings]
        frame = self.opened[self.recipe.frame]
        if not frame.config and any(file.name == METADATA_FILE for file in frame.weight_files):
            without = (
                "holds no config.json, so the output has none: put the model's small files beside its weights first"
            )
            found.append(f"{frame.uri}: {without}")
        return tuple(found)

    @property
    def rooms(self) -> tuple[Room, ...]:
        """The file systems that the outputs go to, with the room that they take there and the room that there is."""
        sidecars = sum(file.size for file in self.plan.sidecars)
        local = [self.outs[number] for number in self.todo if not is_remote(self.outs[number])]
        return rooms(local, self.plan.output_bytes + sidecars)

    def recipe_text(self, output: int) -> str:
        """The recipe file that makes one output again."""
        from rv_distributed.recipe_files.writing import recipe_text

        uris = {name: checkpoint.name for name, checkpoint in self.opened.items()}
        return recipe_text(self.recipe, output, self.plan_options, uris)

    def check_space(self) -> None:
        """Raise OutputError when the outputs do not fit."""
        check_rooms(self.rooms)

    def run(
        self, progress: ProgressCallback | None = None, cancel: threading.Event | None = None
    ) -> tuple[Manifest, ...]:
        """Make the outputs; returns their manifests, in order.

        Finished pieces of an earlier, interrupted run of the same job are checked and kept. ``cancel``, once it is set,
        stops the run at the next piece. Raises OutputError when an output's place is taken or too small, NonFiniteError
        when an output holds NaN or infinity, which is not allowed, RunError when the run fails, and Cancelled.
        """
        self.check_space()
        try:
            made = self._make(progress, cancel or threading.Event()) if self.todo else {}
        except PieceError:
            check_unchanged(self.plan)  # then that is the cause
            raise
        except OSError as error:
            raise RunError(f"{error.filename or 'storage'}: {error.strerror or error}") from error
        # Last of all: until every output is published, each place tells a next run which of them are.
        for out in self.outs:
            tidy(out)
        for number, place in self.pushes.items():
            push_folder(self.outs[number], place)
            remove(self.outs[number])
        return tuple((made | dict(self.complete))[number] for number in range(len(self.outs)))

    def _make(self, progress: ProgressCallback | None, cancel: threading.Event) -> dict[int, Manifest]:
        with ExitStack() as stack:
            runtime = stack.enter_context(self._runtime())
            stagings = []
            for number in self.todo:
                identity = identity_of(self.plan, number)
                overwrite, restart = self.options.overwrite, self.options.restart
                staging = open_staging(self.outs[number], identity, overwrite=overwrite, restart=restart)
                stagings.append(stack.enter_context(closing(staging)))
            reducers = [Reducer(self.plan, *of) for of in zip(self.todo, stagings, strict=True)]
            kept = self._keep(stagings, reducers)
            watch = self._watch(stagings, kept, progress)
            try:
                timings, pieces = self._stream(runtime, stagings, reducers, kept, watch, cancel)
                watch.committing()
                if not self.options.allow_nonfinite:
                    for reducer in reducers:
                        reducer.check_finite()
                manifests = [
                    reducer.commit(timings, pieces, self.recipe_text(number))
                    for number, reducer in zip(self.todo, reducers, strict=True)
                ]
            except BaseException as error:
                watch.stopped(error)
                raise
        return dict(zip(self.todo, manifests, strict=True))

    def _keep(self, stagings: Sequence[Staging], reducers: Sequence[Reducer]) -> set[int]:
        """The pieces that an earlier run finished in all outputs, handed to the reducers; makes room for the rest."""
        finished = [staging.finished(self.plan) for staging in stagings]
        kept = set.intersection(*(set(records) for records in finished))
        for staging, reducer, records in zip(stagings, reducers, finished, strict=True):
            staging.prepare(self.plan)
            for number in kept:
                reducer.add(number, records[number])
        return kept

    def _watch(self, stagings: Sequence[Staging], kept: set[int], callback: ProgressCallback | None) -> Watch:
        todo = sum(piece.stop - piece.start for piece in self.plan.pieces if piece.number not in kept)
        return Watch(
            pieces=len(self.plan.pieces),
            kept=len(kept),
            bytes_total=todo * len(stagings),
            places=stagings,
            callback=callback,
        )

    def _stream(
        self,
        runtime: Runtime,
        stagings: Sequence[Staging],
        reducers: Sequence[Reducer],
        kept: set[int],
        watch: Watch,
        cancel: threading.Event,
    ) -> tuple[Timings, list[PieceRow]]:
        """Run all pieces that are not kept."""

        def tasks() -> Iterator[PieceTask]:
            for piece in self.plan.pieces:
                # Workers ask for the next task before the results of others come.
                _check(cancel)
                if piece.number not in kept:
                    yield task_of(self.plan, piece)

        began = time.monotonic()
        done: list[tuple[PieceResult, float]] = []
        # Closed before the stagings are: no worker may write once another run can take the place.
        with closing(runtime.run(tasks(), self._worker_config(stagings, runtime.shape))) as results:
            for result in results:
                shard = self.plan.shards[self.plan.pieces[result.piece].shard].name
                made = zip(reducers, stagings, result.outputs, result.states, strict=True)
                for reducer, staging, spans, state in made:
                    reducer.add(result.piece, spans)
                    staging.record(Record(result.piece, spans, state), shard)
                watch.add(result)
                # Of its outputs, the reducers have what is wanted.
                done.append((result._replace(outputs=()), time.monotonic() - began))
                _check(cancel)
        shares = watch.workers.values()
        timings = Timings(
            run_s=time.monotonic() - began,
            read_s=sum(share.read_s for share in shares),
            compute_s=sum(share.compute_s for share in shares),
            write_s=sum(share.write_s for share in shares),
            bytes_read=sum(share.bytes_read for share in shares),
            bytes_written=sum(share.bytes_written for share in shares),
            pieces=len(self.plan.pieces),
            pieces_kept=len(kept),
        )
        return timings, piece_rows(self.plan, done)

    def _worker_config(self, stagings: Sequence[Staging], shape: WorkerShape) -> WorkerConfig:
        sizing = self.sizing
        if shape != _expected_shape(self.options, self.runtime):
            sizing = _sized(self.plan, self.outs, self.options, self.runtime, shape)
        return WorkerConfig(
            outputs=tuple(staging.folder for staging in stagings),
            numbers=self.todo,
            weighted=self.plan.weighted,
            device=self.options.device,
            streams=sizing.streams,
            cpus=shape.cpus,
            chunk_bytes=sizing.chunk_bytes,
            arenas=sizing.arenas,
            buffer_bytes=sizing.buffer_bytes,
            stats=self.plan.stats,
            arithmetic=self.plan.arithmetic,
        )

    def _runtime(self) -> Runtime:
        if self.runtime == "ray":
            from rv_distributed.runtime.on_ray import RayRuntime

            return RayRuntime(self.options, pieces=len(self.plan.pieces))
        from rv_distributed.runtime.local import LocalRuntime

        return LocalRuntime(self.options.device, _expected_shape(self.options, self.runtime))
