"""A run, from named checkpoints to published outputs: open, plan, run, commit.

`prepare` opens and checks every input and makes the plan, which is all that ``--dry-run`` needs;
`Job.run` does the work.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from rv_distributed.checkpoint.manifest import MANIFEST_FILE, Manifest, Timings
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.errors import InputError, OutputError, Problem, UsageError
from rv_distributed.identity import identity_of
from rv_distributed.opening import open_checkpoint
from rv_distributed.plan import Plan, PlanOptions, make_plan, task_of
from rv_distributed.recipe import Recipe
from rv_distributed.reduce import Reducer
from rv_distributed.runtime.model import Runtime, WorkerConfig
from rv_distributed.runtime.select import RunOptions, choose_runtime, usable_cpus
from rv_distributed.runtime.sizing import DEFAULT_BUDGET_BYTES, Sizing, bytes_to_read, size_buffers
from rv_distributed.staging import Staging, staging_folder
from rv_distributed.storage import local_path


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is, after a piece."""

    pieces: int
    """Finished, with those kept from an earlier run."""
    pieces_total: int
    pieces_kept: int
    bytes_written: int
    """Of output, in all outputs, by this run."""
    bytes_total: int
    """What this run will have written at its end."""


ProgressCallback = Callable[[Progress], None]


def prepare(recipe: Recipe, outs: Sequence[str], plan_options: PlanOptions, run_options: RunOptions) -> Job:
    """Open and check every input, and plan the run. Writes nothing.

    ``outs`` are the output folders, one for each row of ``recipe.alphas``. Raises UsageError, InputError
    with the problems of all inputs, and OutputError.
    """
    if len(outs) != len(recipe.alphas):
        raise UsageError("give each alpha an output of its own")
    outs = [local_path(out) for out in outs]
    with _collector_paused():
        opened = _open_all(recipe)
        _check_places(outs, opened, run_options)
        plan = make_plan(recipe, opened, plan_options)
    runtime = choose_runtime(run_options)
    streams = (run_options.workers or min(16, 2 * usable_cpus())) if runtime == "local" else 2
    sizing = size_buffers(plan, streams=streams, budget_bytes=_budget(run_options))
    return Job(recipe, opened, plan, tuple(outs), run_options, runtime, sizing)


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


def _open_all(recipe: Recipe) -> dict[str, Checkpoint]:
    uris = [recipe.target] if recipe.target is not None else []
    for vector in recipe.vectors:
        uris += [vector.plus] if vector.minus is None else [vector.plus, vector.minus]

    def load(uri: str) -> Checkpoint | InputError:
        try:
            return open_checkpoint(uri)
        except InputError as error:
            return error

    unique = list(dict.fromkeys(uris))
    opened: dict[str, Checkpoint] = {}
    problems: list[Problem] = []
    with ThreadPoolExecutor(len(unique)) as pool:
        for uri, result in zip(unique, pool.map(load, unique), strict=True):
            if isinstance(result, InputError):
                problems += result.problems
            else:
                opened[uri] = result
    if problems:
        raise InputError(problems)
    return opened


def _check_places(outs: Sequence[str], opened: Mapping[str, Checkpoint], options: RunOptions) -> None:
    places = sorted(outs)
    for out, other in combinations(places, 2):
        if os.path.commonpath([out, other]) == out:
            raise UsageError(f"--out: {other} lies in {out}; give each alpha a folder beside the others")
    for out in places:
        for checkpoint in opened.values():
            real = os.path.realpath(checkpoint.uri)
            if os.path.commonpath([os.path.realpath(out), real]) in (real, os.path.realpath(out)):
                raise OutputError(f"{out}: the output and the input {checkpoint.uri} overlap. Give another --out.")
        if os.path.lexists(out) and not options.overwrite:
            raise OutputError(f"{out} already exists. Give another --out, or --overwrite to replace it.")
        if os.path.ismount(out):
            raise OutputError(f"{out} is a mount point, which no rename can replace. Give a folder in it as --out.")
        if os.path.isdir(out) and not os.path.islink(out) and os.listdir(out) and not _is_output(out):
            raise OutputError(f"{out} is no output of rv, so --overwrite leaves it alone. Remove it yourself first.")
        parent = os.path.dirname(out)
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent):
            raise OutputError(f"{out}: {parent} is no folder. Give another --out.")
        if not os.access(parent, os.W_OK):
            raise OutputError(f"{out}: {parent} cannot be written to. Give another --out, or change its permissions.")


def _budget(options: RunOptions) -> int:
    return DEFAULT_BUDGET_BYTES if options.memory_budget_bytes is None else options.memory_budget_bytes


def _is_output(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, MANIFEST_FILE))


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is checked, planned and ready."""

    recipe: Recipe
    opened: Mapping[str, Checkpoint]
    """The inputs, by the names that the recipe gives them."""
    plan: Plan
    outs: tuple[str, ...]
    """Absolute paths, one an output."""
    options: RunOptions
    runtime: Literal["local", "ray"]
    sizing: Sizing

    @property
    def bytes_in(self) -> int:
        """Bytes of tensor data that the run reads."""
        return bytes_to_read(self.plan)

    @property
    def bytes_out(self) -> int:
        """Bytes of shards that the run writes, in all outputs."""
        return self.plan.output_bytes * len(self.outs)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd about the inputs but does not stop the run."""
        return tuple(warning for checkpoint in self.opened.values() for warning in checkpoint.warnings)

    def free_bytes(self) -> int:
        """Free disk space at the first output, counting what an unfinished run has reserved there."""
        parent = os.path.dirname(self.outs[0])
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        held = 0
        for out in self.outs:
            for folder, _, names in os.walk(staging_folder(out)):
                held += sum(os.stat(os.path.join(folder, name)).st_blocks * 512 for name in names)
        return shutil.disk_usage(parent).free + held

    def check_space(self) -> None:
        """Raise OutputError when the outputs do not fit."""
        free = self.free_bytes()
        if self.bytes_out > free:
            raise OutputError(
                f"{self.outs[0]}: the output takes {self.bytes_out} bytes, but {free} are free. "
                "Free some space, or give another --out."
            )

    def run(self, progress: ProgressCallback | None = None) -> tuple[Manifest, ...]:
        """Make the outputs; returns their manifests, in order.

        Finished pieces of an earlier, interrupted run of the same job are checked and kept. Raises
        OutputError when an output's place is taken or too small, RunError when the run fails.
        """
        self.check_space()
        with ExitStack() as stack:
            runtime = stack.enter_context(self._runtime())
            stagings = []
            for number, out in enumerate(self.outs):
                identity = identity_of(self.plan, number)
                overwrite, restart = self.options.overwrite, self.options.restart
                staging = Staging(out, identity, overwrite=overwrite, restart=restart)
                stagings.append(stack.enter_context(closing(staging)))
            reducers = [Reducer(self.plan, number, staging) for number, staging in enumerate(stagings)]
            kept = self._keep(stagings, reducers)
            timings = self._stream(runtime, stagings, reducers, kept, progress)
            frame = self.opened[self.recipe.target or self.recipe.vectors[0].plus]
            return tuple(reducer.commit(frame, self.opened, timings) for reducer in reducers)

    def _keep(self, stagings: Sequence[Staging], reducers: Sequence[Reducer]) -> set[int]:
        """The pieces that an earlier run finished in all outputs, handed to the reducers; makes room for the rest."""
        finished = [staging.finished(self.plan) for staging in stagings]
        kept = set.intersection(*(set(records) for records in finished))
        for staging, reducer, records in zip(stagings, reducers, finished, strict=True):
            staging.preallocate(self.plan)
            for number in kept:
                reducer.add(number, records[number])
        return kept

    def _stream(
        self,
        runtime: Runtime,
        stagings: Sequence[Staging],
        reducers: Sequence[Reducer],
        kept: set[int],
        progress: ProgressCallback | None,
    ) -> Timings:
        """Run all pieces that are not kept."""
        todo = [piece for piece in self.plan.pieces if piece.number not in kept]
        bytes_total = sum(piece.stop - piece.start for piece in todo) * len(self.outs)
        bytes_read = bytes_written = 0
        read_s = compute_s = write_s = 0.0
        tasks = (task_of(self.plan, piece) for piece in todo)
        began = time.monotonic()
        # Closed before the stagings are: no worker may write once another run can take the place.
        with closing(runtime.run(tasks, self._worker_config(stagings))) as results:
            for done, result in enumerate(results, 1):
                for reducer, staging, spans in zip(reducers, stagings, result.outputs, strict=True):
                    reducer.add(result.piece, spans)
                    staging.record(result.piece, spans)
                bytes_read += result.bytes_read
                bytes_written += result.bytes_written
                read_s += result.waited.read_s
                compute_s += result.waited.compute_s
                write_s += result.waited.write_s
                if progress is not None:
                    pieces = len(kept) + done
                    progress(Progress(pieces, len(self.plan.pieces), len(kept), bytes_written, bytes_total))
        return Timings(
            run_s=time.monotonic() - began,
            read_s=read_s,
            compute_s=compute_s,
            write_s=write_s,
            bytes_read=bytes_read,
            bytes_written=bytes_written,
            pieces=len(self.plan.pieces),
            pieces_kept=len(kept),
        )

    def _worker_config(self, stagings: Sequence[Staging]) -> WorkerConfig:
        return WorkerConfig(
            outputs=tuple(staging.folder for staging in stagings),
            alphas=self.plan.alphas,
            device=self.options.device,
            streams=self.sizing.streams,
            chunk_bytes=self.sizing.chunk_bytes,
            measure=True,
        )

    def _runtime(self) -> Runtime:
        if self.runtime == "ray":
            from rv_distributed.runtime.on_ray import RayRuntime

            return RayRuntime(
                address=self.options.address,
                workers=self.options.workers,
                pieces=len(self.plan.pieces),
                buffer_bytes=self.sizing.buffer_bytes,
                device=self.options.device,
            )
        from rv_distributed.runtime.local import LocalRuntime

        return LocalRuntime(self.options.device)
