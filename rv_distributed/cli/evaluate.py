"""``rv eval``: is the vector any good? The target beside the moved target, on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json as jsonlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rv_distributed.cli.merge import WHOLE, Alpha, Target, parse_alphas
from rv_distributed.cli.options import Common, with_common
from rv_distributed.cli.terminal import say, warn
from rv_distributed.errors import UsageError, one_line
from rv_distributed.recipe import Vector
from rv_distributed.units import plural, show_seconds

if TYPE_CHECKING:
    from rv_distributed.evaluation import Ask, Evaluation, EvaluationJob
    from rv_distributed.evaluation.job import Progress

_LOG = logging.getLogger(__name__)

Out = Annotated[str, typer.Option("--out", help="Folder for the results; a rerun goes on there.", metavar="PATH")]
StoredVector = Annotated[str | None, typer.Option("--vector", help="Stored vector.", metavar="PATH")]
Donor = Annotated[str | None, typer.Option("--donor", help="Or: checkpoint A of A − B.", metavar="PATH")]
Reference = Annotated[str | None, typer.Option("--reference", help="Checkpoint B of A − B.", metavar="PATH")]
Minus = Annotated[bool, typer.Option("--minus", help="Evaluate also target − v.")]
Tasks = Annotated[
    str | None, typer.Option("--tasks", help="Tasks or groups of lm-evaluation-harness.", metavar="NAME[,…]")
]
Suite = Annotated[
    str | None, typer.Option("--suite", help="paper: the benchmarks of arXiv 2509.01363.", metavar="NAME")
]
TaskPath = Annotated[
    list[str] | None, typer.Option("--task-path", help="Folder with tasks of your own; repeat.", metavar="PATH")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first items of each task.", metavar="N")]
Fewshot = Annotated[int | None, typer.Option("--num-fewshot", help="Examples before each question.", metavar="N")]
GenKwargs = Annotated[
    str | None, typer.Option("--gen-kwargs", help="Of the generation, over the task's own.", metavar="KEY=VALUE,…")
]
Metric = Annotated[
    str | None, typer.Option("--metric", help="The score to compare, if not the task's first.", metavar="NAME[,FILTER]")
]
Template = Annotated[
    bool, typer.Option("--apply-chat-template", help="Ask as a user of the model's chat template would.")
]
Perturb = Annotated[
    str | None,
    typer.Option("--perturb", help="Ask also perturbed: noise, rename, reorder, distract.", metavar="NAME[,…]"),
]
PerturbSeed = Annotated[int, typer.Option("--perturb-seed", help="Of the perturbations.", metavar="N")]
PerturbField = Annotated[
    str | None, typer.Option("--perturb-field", help="Field of an item that is the question.", metavar="NAME")
]
Select = Annotated[
    bool, typer.Option("--select", help="Choose alpha on one half of the items; report on the other half.")
]
InMemory = Annotated[
    bool, typer.Option("--in-memory", help="Load the target once and move it, writing no other model.")
]
BackendName = Annotated[Literal["hf", "vllm"], typer.Option("--backend", help="What runs the models.")]
BatchSize = Annotated[str, typer.Option("--batch-size", help="Of the backend; a number, or auto.", metavar="N")]
ModelArgs = Annotated[
    str, typer.Option("--model-args", help="Of the harness's model, such as max_length.", metavar="KEY=VALUE,…")
]
Consent = Annotated[
    bool,
    typer.Option(
        "--confirm-run-unsafe-code",
        help="The harness's consent to run code that a model wrote, as humaneval does.",
        allow_from_autoenv=False,
    ),
]


@with_common
def evaluate(
    target: Target,
    out: Out,
    common: Common,
    vector: StoredVector = None,
    donor: Donor = None,
    reference: Reference = None,
    alpha: Alpha = WHOLE,
    minus: Minus = False,
    tasks: Tasks = None,
    suite: Suite = None,
    task_path: TaskPath = None,
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    gen_kwargs: GenKwargs = None,
    metric: Metric = None,
    apply_chat_template: Template = False,
    perturb: Perturb = None,
    perturb_seed: PerturbSeed = 0,
    perturb_field: PerturbField = None,
    select: Select = False,
    in_memory: InMemory = False,
    backend: BackendName = "hf",
    batch_size: BatchSize = "8",
    model_args: ModelArgs = "",
    confirm_run_unsafe_code: Consent = False,
) -> None:
    """Evaluate the target, and the target moved along the vector, on tasks of lm-evaluation-harness.

    Every pair of a model and a task is kept once it is finished: the same command goes on with the others.

    \b
    Examples:
      rv eval --target instruct --vector vector --alpha 0.5,1.0 --minus --tasks gsm8k_cot --out eval
      rv eval --target instruct --donor grpo --reference sft --suite paper --in-memory --out eval
      rv eval --target instruct --vector vector --alpha 0.5,0.7,1.0 --select --tasks gsm8k_cot --out eval
    """
    from rv_distributed.evaluation import EvaluationOptions, Means, prepare_evaluation

    given = {
        "limit": limit,
        "num_fewshot": num_fewshot,
        "gen_kwargs": gen_kwargs,
        "metric": metric,
        "apply_chat_template": apply_chat_template or None,
        "seed": perturb_seed,
        "field": perturb_field,
    }
    asks = _asks(tasks, suite, _names(perturb), {name: value for name, value in given.items() if value is not None})
    if in_memory and common.dtype != "auto":
        raise UsageError("--dtype goes without --in-memory: the loaded model has the target's dtype")
    options = EvaluationOptions(
        asks=asks,
        alphas=tuple(value for _, value in parse_alphas(alpha)),
        minus=minus,
        select=select,
        in_memory=in_memory,
        means=Means(
            backend=backend,
            batch_size=batch_size,
            model_args=model_args,
            task_paths=tuple(task_path or ()),
            run_unsafe_code=confirm_run_unsafe_code,
            shows_progress=sys.stderr.isatty() and common.log_format == "text" and not common.quiet,
        ),
        plan=common.plan_options(),
        run=common.run_options(),
    )
    job = prepare_evaluation(target, _vector(vector, donor, reference), out, options)
    talks = not (common.json or common.quiet)
    if talks:
        say(plan_summary(job))
    if common.dry_run:
        if common.json:
            say(jsonlib.dumps({"schema_version": 1, "status": "prepared", "evaluation": plan_document(job)}, indent=2))
        return
    evaluation = job.run(None if common.quiet else _log if common.log_format == "json" else _tell)
    if talks:
        say(closing_summary(job, evaluation))
    if common.json:
        status = "failed" if evaluation.failed else "evaluated"
        document = {"schema_version": 1, "status": status, "path": job.out, "evaluation": evaluation.document()}
        say(jsonlib.dumps(document, indent=2))
    if evaluation.failed:
        causes: dict[str, list[str]] = {}
        for failure in evaluation.failed:
            causes.setdefault(failure.cause, []).append(failure.pair)
        for cause, pairs in causes.items():
            warn(f"rv: {one_line('; '.join(pairs))}: {one_line(cause)}")
        failed = f"{len(evaluation.failed)} of {len(job.pairs)}"
        warn(f"rv: {failed} failed. Run the same command again: what is finished is kept.")
        raise typer.Exit(1)


def _asks(tasks: str | None, suite: str | None, perturbations: Sequence[str], given: dict[str, Any]) -> tuple[Ask, ...]:
    """Every task as it is, and under every perturbation; what was given holds for all."""
    from rv_distributed.evaluation import Ask
    from rv_distributed.evaluation.perturbations import PERTURBATIONS
    from rv_distributed.evaluation.suites import suite as tasks_of

    if unknown := [name for name in perturbations if name not in PERTURBATIONS]:
        raise UsageError(f"--perturb: {unknown[0]!r} is not one of {', '.join(PERTURBATIONS)}")
    asks = [Ask(name) for name in _names(tasks)] + list(tasks_of(suite) if suite is not None else ())
    every = [replace(ask, **given) for ask in asks]
    plain = [replace(ask, seed=0, field=None) for ask in every]
    return (*plain, *(replace(ask, perturbation=name) for ask in every for name in perturbations))


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _vector(vector: str | None, donor: str | None, reference: str | None) -> Vector | None:
    if vector is not None and donor is None and reference is None:
        return Vector(vector)
    if vector is None and donor is not None and reference is not None:
        return Vector(donor, reference)
    if (vector, donor, reference) != (None, None, None):
        raise UsageError("give --vector, or --donor and --reference; without any, the target alone is evaluated")
    return None


def plan_summary(job: EvaluationJob) -> str:
    """What is going to be evaluated, for people."""
    models = list(dict.fromkeys(pair.variant.label for pair in job.pairs))
    rows = [("target", job.target)]
    if job.job is not None:
        rows += [(item.role, item.uri) for item in job.job.plan.inputs[1:]]
    rows.append(("models", f"{', '.join(models)}  ({_how(job)})"))
    rows += [("task", _task(ask, *job.items[ask])) for ask in job.options.asks]
    if job.options.select:
        rows.append(("alpha", "chosen on one half of the items; the other half is reported"))
    rows.append(("pairs", f"{len(job.pairs)} of a model and a task, {len(job.kept)} of them finished already"))
    rows.append(("results", job.out))
    return "\n".join(f"{label:>10}  {one_line(text)}" for label, text in rows)


def _how(job: EvaluationJob) -> str:
    if job.options.in_memory:
        return "the target moved in memory"
    return f"written to {job.out}/models" if job.writes_models else "as they are"


def _task(ask: Ask, items: int, perturbed: int) -> str:
    found = [plural(items, "item") + (f", {perturbed} of them asked differently" if ask.perturbation else "")]
    found += [f"{ask.num_fewshot} examples"] if ask.num_fewshot is not None else []
    found += [text for text in (ask.metric, ask.gen_kwargs) if text]
    found += ["chat template"] if ask.apply_chat_template else []
    return f"{ask.label}  ({', '.join(found)})"


def plan_document(job: EvaluationJob) -> dict[str, Any]:
    """What is going to be evaluated, as JSON values."""
    return {
        "target": job.target,
        "settings": job.settings(),
        "items": [{"task": ask.label, "items": n, "perturbed": changed} for ask, (n, changed) in job.items.items()],
        "pairs": [
            {"task": pair.ask.label, "model": pair.variant.label, "kept": pair in job.kept} for pair in job.pairs
        ],
        "versions": dict(job.versions),
    }


def _tell(progress: Progress) -> None:
    # What failed is told at the end, with its cause.
    found = "failed" if progress.mean is None else f"{progress.mean:.4f}"
    took = show_seconds(progress.seconds)
    warn(f"{progress.done:>4}/{progress.total}  {one_line(progress.pair.label)}: {found} ({took})")


def _log(progress: Progress) -> None:
    fields = {"task": progress.pair.ask.label, "alpha": progress.pair.variant.alpha, "mean": progress.mean}
    _LOG.info("evaluated", extra={"fields": {**fields, "pairs": progress.done, "pairs_total": progress.total}})


def closing_summary(job: EvaluationJob, evaluation: Evaluation) -> str:
    """What came of it, for people."""
    from rv_distributed.evaluation.statistics import FORMULA
    from rv_distributed.evaluation.tables import HEADER, selection, task_tables

    lines = []
    for table in task_tables(evaluation.outcome):
        rows = [HEADER, *table.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        lines += ["", one_line(table.title)]
        for name, *cells in rows:
            shown = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append(one_line(f"  {name.ljust(widths[0])}  {'  '.join(shown)}".rstrip()))
    chosen = [selection(evaluation.outcome.selected)] if evaluation.outcome.selected is not None else []
    return "\n".join([*lines, "", *chosen, FORMULA, one_line(job.out)])
