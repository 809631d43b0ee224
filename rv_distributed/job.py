"""A run that is checked and planned, to published outputs: stream, record, commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass

from rv_distributed.checkpoint.manifest import Manifest, Timings
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.checkpoint.pieces import PieceRow
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import Cancelled, PieceError, RunError
from rv_distributed.identity import identity_of
from rv_distributed.plan import PieceTask, Plan, PlanOptions, role_warnings, task_of
from rv_distributed.pushing import push_folder
from rv_distributed.recipe import Recipe
from rv_distributed.reduce import Reducer, check_unchanged
from rv_distributed.results import piece_rows
from rv_distributed.runtime.model import PieceResult, Runtime, WorkerConfig, WorkerShape
from rv_distributed.runtime.select import ChosenRuntime, RunOptions, expected_shape
from rv_distributed.runtime.sizing import Sizing, bytes_to_read, size_worker
from rv_distributed.staging import Record, Staging, noted, open_staging, tidy
from rv_distributed.storage.ending import briefly, ending_briefly
from rv_distributed.storage.places import Room, check_rooms, rooms
from rv_distributed.storage.publish import remove
from rv_distributed.storage.uris import HubUri
from rv_distributed.watching import ProgressCallback, Watch


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
        if self.recipe.operation != "extract" and not any(file.name == "config.json" for file in frame.sidecars):
            found.append(
                f"{frame.uri}: holds no config.json, so the output has none, and transformers cannot load it: put the "
                "model's small files beside its weights first"
            )
        return (*found, *self.plan.warnings, *role_warnings(self.recipe, self.opened))

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

    def unfinished(self) -> int:
        """How many pieces an earlier run has finished, as far as its notes tell: `run` checks them and keeps them.

        Raises OutputError, as `run`, when that was a run of another job.
        """
        if self.options.restart or not self.todo:
            return 0
        found = [noted(self.outs[number], identity_of(self.plan, number)) for number in self.todo]
        return len(set.intersection(*found))

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
            with suppress(OSError):
                briefly(lambda: check_unchanged(self.plan))  # a change is the cause then
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
        with self._runtime() as runtime, ending_briefly() as stack:
            stagings = []
            for number in self.todo:
                identity = identity_of(self.plan, number)
                overwrite, restart = self.options.overwrite, self.options.restart
                staging = open_staging(self.outs[number], identity, overwrite=overwrite, restart=restart)
                stagings.append(stack.enter_context(closing(staging)))
            reducers = [Reducer(self.plan, *of) for of in zip(self.todo, stagings, strict=True)]
            kept = self._keep(stagings, reducers)
            watch = stack.enter_context(self._watch(stagings, kept, progress))
            timings, pieces = self._stream(runtime, stagings, reducers, kept, watch, cancel)
            watch.committing()
            # Every commit does so again; but NaN, or a small file that cannot be read, may come of a change.
            check_unchanged(self.plan)
            if not self.options.allow_nonfinite:
                for reducer in reducers:
                    reducer.check_finite()
            manifests = [
                reducer.commit(timings, pieces, self.recipe_text(number))
                for number, reducer in zip(self.todo, reducers, strict=True)
            ]
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
                check_cancel(cancel)
                if piece.number not in kept:
                    yield task_of(self.plan, piece)

        began = time.monotonic()
        done: list[tuple[PieceResult, float]] = []
        config = self._worker_config(stagings, runtime.shape)
        # Closed before the stagings are: workers end before another run can take the place, but for those that hang.
        with closing(runtime.run(tasks(), config, kept=len(kept))) as results:
            for result in results:
                shard = self.plan.shards[self.plan.pieces[result.piece].shard].name
                made = zip(reducers, stagings, result.outputs, result.states, strict=True)
                for reducer, staging, spans, state in made:
                    reducer.add(result.piece, spans)
                    staging.record(Record(result.piece, spans, state), shard)
                watch.add(result)
                # Of its outputs, the reducers have what is wanted.
                done.append((result._replace(outputs=()), time.monotonic() - began))
                check_cancel(cancel)
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
        if shape != expected_shape(self.options, self.runtime):
            remote_outputs = sum(map(is_remote, self.outs))
            sizing = size_worker(self.plan, self.options, self.runtime, shape, remote_outputs=remote_outputs)
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

        return LocalRuntime(self.options.device, expected_shape(self.options, self.runtime))


def check_cancel(cancel: threading.Event) -> None:
    """Raise Cancelled once the event is set."""
    if cancel.is_set():
        raise Cancelled("stopped by its caller; the same call resumes")
