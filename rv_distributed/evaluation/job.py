"""An evaluation, from named checkpoints to its result files: check, make the models, ask, compare.

`prepare_evaluation` opens the checkpoints, plans the models and loads the tasks, so that all that is wrong is known
before a model is loaded; `EvaluationJob.run` does the work. Finished pairs of a model and a task are kept in the
output's folder; the same command goes on with the others.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata, util
from typing import Any, Final, NamedTuple

from blake3 import blake3

from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import OutputError, RunError, UsageError, redacted
from rv_distributed.evaluation.model import Answers, Ask, Failed, Means, Pair, Variant
from rv_distributed.evaluation.outcome import outcome_of
from rv_distributed.evaluation.records import FOLDER, read_record, write_record
from rv_distributed.evaluation.results import ITEMS_FILE, RESULTS_FILE, Evaluation, write_results
from rv_distributed.evaluation.statistics import estimate
from rv_distributed.identity import identity_digest, identity_of
from rv_distributed.job import Job, check_cancel
from rv_distributed.opening import open_checkpoint
from rv_distributed.plan import PlanOptions
from rv_distributed.preparing import prepare
from rv_distributed.recipe import Operation, Recipe, Vector, as_float32, show_alpha
from rv_distributed.runtime.select import RunOptions, choose_runtime
from rv_distributed.runtime.worker import choose_device
from rv_distributed.storage import resolve, resolve_output

MODELS: Final = "models"
_PACKAGES: Final = {"hf": ("lm_eval", "transformers", "accelerate"), "vllm": ("lm_eval", "vllm")}
_OURS: Final = frozenset((FOLDER, MODELS, RESULTS_FILE, ITEMS_FILE))


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is evaluated, and how."""

    asks: tuple[Ask, ...]
    """The tasks, each in every way that it is to be asked."""
    alphas: tuple[float, ...] = (1.0,)
    """The target is evaluated as it is, and moved along the vector by each of them."""
    minus: bool = False
    """Evaluate also the target without the vector, ``T − v``."""
    select: bool = False
    """Choose alpha, of those asked for, on one half of the items, and compare the models on the other half."""
    in_memory: bool = False
    """Load the target once and move it, in place of writing every model and loading it."""
    means: Means = field(default_factory=Means)
    plan: PlanOptions = field(default_factory=PlanOptions)
    """Of the models that are made."""
    run: RunOptions = field(default_factory=RunOptions)
    """Where they are made, and where they are evaluated."""

    def __post_init__(self) -> None:
        if not self.asks:
            raise UsageError("nothing to ask: give --tasks or --suite")
        if len(set(self.asks)) < len(self.asks):
            raise UsageError("a task is given twice in the same way")
        if len({as_float32(alpha) for alpha in self.alphas}) < len(self.alphas):
            raise UsageError("an alpha is given twice")
        if self.in_memory and self.means.backend != "hf":
            raise UsageError("--in-memory goes with --backend hf: only its models can be moved")


class Progress(NamedTuple):
    """A pair that is finished."""

    pair: Pair
    mean: float | None
    """Its accuracy; None where it failed."""
    seconds: float
    """Since the one before it, or the start."""
    done: int
    """Pairs that are finished, with this one and those that were kept."""
    total: int


def prepare_evaluation(target: str, vector: Vector | None, out: str, options: EvaluationOptions) -> EvaluationJob:
    """Check everything that can be checked before a model is loaded. Writes nothing.

    Without a vector the target alone is evaluated. Raises UsageError; InputError with the problems of the checkpoints,
    or else with those of the tasks; OutputError when ``out`` is something else.
    """
    _check_packages(options.means)
    out = resolve_output(out)
    for option, place in (("--target", resolve(target)), ("--out", out)):
        if is_remote(place):
            what = f"{option}: {redacted(place)} is no local folder"
            raise UsageError(f"{what}; rv eval loads models from such, and keeps its results in one")
    _check_place(out)
    alphas = tuple(dict.fromkeys(as_float32(alpha) for alpha in options.alphas if as_float32(alpha)))
    if options.minus and -1.0 not in alphas:
        alphas += (-1.0,)
    job, frame = None, None
    if vector is not None and alphas:
        outs = [os.path.join(out, MODELS, f"alpha-{show_alpha(alpha)}") for alpha in alphas]
        operation: Operation = "apply" if vector.minus is None else "transfer"
        recipe = Recipe(operation, target, (vector,), tuple((alpha,) for alpha in alphas))
        job = prepare(recipe, outs, options.plan, options.run)
        frame = job.opened[target]
    elif options.minus or options.select:
        raise UsageError("--minus and --select need a vector: give --vector, or --donor and --reference")
    else:
        frame = open_checkpoint(target)
    variants = _variants(frame, job, alphas if job is not None else (), options.in_memory)

    from rv_distributed.evaluation.harness import check_tasks

    asked = check_tasks(options.asks, options.means)
    versions = _versions(options.means)
    pairs = tuple(
        Pair(variant, ask, _identity(variant, ask, asked[ask].digest, options.means, versions))
        for variant in variants
        for ask in options.asks
    )
    kept = {} if options.run.restart else _kept(out, pairs)
    items = {ask: (found.items, found.perturbed) for ask, found in asked.items()}
    return EvaluationJob(frame.uri, vector, out, options, job, pairs, items, kept, versions)


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """An evaluation that is checked and ready."""

    target: str
    vector: Vector | None
    out: str
    """Absolute path of the folder."""
    options: EvaluationOptions
    job: Job | None
    """The run that writes the models; None where only the target is evaluated."""
    pairs: tuple[Pair, ...]
    """Model by model, the target first."""
    items: Mapping[Ask, tuple[int, int]]
    """How many items a task has, and how many of their questions are perturbed."""
    kept: Mapping[Pair, Answers]
    """What an earlier run has finished."""
    versions: Mapping[str, str]

    @property
    def todo(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair not in self.kept)

    @property
    def writes_models(self) -> bool:
        return self.job is not None and not self.options.in_memory and any(pair.variant.alpha for pair in self.todo)

    def run(
        self, progress: Callable[[Progress], None] | None = None, cancel: threading.Event | None = None
    ) -> Evaluation:
        """Make the models and ask them all. The result files are written also where pairs failed. ``cancel``, once it
        is set, stops it with Cancelled, at the next piece of the models or the end of a pair.

        Raises UsageError where there is no GPU that was asked for; OutputError and RunError of the models' run. A pair
        that fails is in the result.
        """
        if choose_runtime(self.options.run) == "local":
            choose_device(self.options.run.device)  # may import torch, which a dry run is spared
        if self.writes_models and self.job is not None:
            self.job.run(cancel=cancel)
        answers, failures = dict(self.kept), []
        cancel = cancel or threading.Event()
        check_cancel(cancel)
        try:
            os.makedirs(self.out, exist_ok=True)
            began = time.monotonic()
            for pair, found in self._results():
                mean = None
                if isinstance(found, Failed):
                    failures.append(found)
                else:
                    write_record(self.out, pair, found)
                    answers[pair] = found
                    mean = estimate([item.score for item in found.items]).mean
                if progress is not None:
                    seconds, began = time.monotonic() - began, time.monotonic()
                    progress(Progress(pair, mean, seconds, len(answers) + len(failures), len(self.pairs)))
                check_cancel(cancel)
            ordered = {pair: answers[pair] for pair in self.pairs if pair in answers}
            evaluation = self._evaluation(ordered, tuple(failures))
            write_results(self.out, evaluation, ordered)
        except OSError as error:
            raise RunError(f"{error.filename or self.out}: {error.strerror or error}") from error
        return evaluation

    def _results(self) -> Iterator[tuple[Pair, Answers | Failed]]:
        if not self.todo:
            return
        means = replace(self.options.means, device=self.options.run.device)
        if choose_runtime(self.options.run) == "ray":
            from rv_distributed.evaluation.on_ray import run_on_ray

            results = run_on_ray(self.todo, means, self.options.run)
        else:
            from rv_distributed.evaluation.local import run_here

            results = run_here(self.todo, means)
        with closing(results):
            yield from results

    def _evaluation(self, answers: Mapping[Pair, Answers], failures: tuple[Failed, ...]) -> Evaluation:
        moved = [pair.variant.alpha for pair in self.pairs if pair.variant.alpha]
        candidates = [alpha for alpha in dict.fromkeys(moved) if alpha in map(as_float32, self.options.alphas)]
        try:
            outcome = outcome_of(answers, select=self.options.select, candidates=candidates)
        except ValueError as error:
            raise RunError(f"{error}. {'; '.join(f'{one.pair}: {one.cause}' for one in failures)}") from error
        inputs = self.job.plan.inputs[1:] if self.job is not None else ()
        return Evaluation(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            target=self.target,
            vector={item.role: item.uri for item in inputs},
            settings=self.settings(),
            versions=self.versions,
            outcome=outcome,
            failed=failures,
        )

    def settings(self) -> dict[str, Any]:
        """All that was asked for, as JSON values."""
        means = self.options.means
        return {
            "tasks": [asdict(ask) for ask in self.options.asks],
            "alphas": sorted({pair.variant.alpha for pair in self.pairs}),
            "select": self.options.select,
            "in_memory": self.options.in_memory,
            "backend": means.backend,
            "model_args": means.model_args,
            "batch_size": means.batch_size,
            "options": dict(self.job.plan.options) if self.job is not None else {},
        }


def _variants(frame: Checkpoint, job: Job | None, alphas: Sequence[float], in_memory: bool) -> list[Variant]:
    """The target, and the target moved along the vector."""
    files = {file.name: file.state for file in (*frame.weight_files, *frame.sidecars)}
    own = {"target": frame.uri, "fingerprint": frame.fingerprint, "files": files}
    plan = job.plan if job is not None and in_memory else None
    variants = [Variant(0.0, frame.uri, identity_digest(own), plan)]
    for number, alpha in enumerate(alphas):
        if job is not None:
            folder = frame.uri if in_memory else job.outs[number]
            variants.append(Variant(alpha, folder, identity_digest(identity_of(job.plan, number)), plan))
    return variants


def _identity(variant: Variant, ask: Ask, task: str, means: Means, versions: Mapping[str, str]) -> str:
    own = {"model": variant.identity, "asked": asdict(ask), "task": task, "versions": dict(versions)}
    own |= {"backend": means.backend, "model_args": means.model_args}
    return blake3(json.dumps(own, sort_keys=True).encode()).hexdigest()


def _kept(out: str, pairs: Sequence[Pair]) -> dict[Pair, Answers]:
    return {pair: answers for pair in pairs if (answers := read_record(out, pair)) is not None}


def _versions(means: Means) -> dict[str, str]:
    """Of what decides the answers, beside the weights."""
    names = ("rv-distributed", "lm_eval", "torch", "transformers", *(("vllm",) if means.backend == "vllm" else ()))
    return {name: metadata.version(name) for name in names}


def _check_packages(means: Means) -> None:
    missing = [name for name in _PACKAGES[means.backend] if util.find_spec(name) is None]
    if missing:
        extra = "pip install 'rv-distributed[eval]'" + (" vllm" if "vllm" in missing else "")
        raise UsageError(f"rv eval needs {', '.join(missing)}: {extra}")


def _check_place(out: str) -> None:
    if os.path.lexists(out) and not os.path.isdir(out):
        raise OutputError(f"{out} is no folder. Give another --out.")
    names = os.listdir(out) if os.path.isdir(out) else []
    # A run that was killed may have left a file that `write_durably` had not renamed yet.
    strangers = sorted(name for name in names if name.removesuffix(".new") not in _OURS)
    if strangers:
        raise OutputError(f"{out} holds {strangers[0]}, which is not of an evaluation. Give another --out.")
