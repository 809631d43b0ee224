"""lm-evaluation-harness: which tasks there are, and a model's answers to one. Nothing else imports lm_eval.

`check_tasks` comes first and is called once, by the driver; then `Harness.answer` for each pair, by the driver or by a
task of Ray, which loads the model when it is another one than before.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from typing import Any, Final, NamedTuple

import numpy as np
from blake3 import blake3

from rv_distributed.errors import InputError, Problem, RunError, UsageError, one_line
from rv_distributed.evaluation.in_memory import Mover
from rv_distributed.evaluation.model import CONSENT_VARIABLE, Answers, Ask, Item, Means, Pair, Variant
from rv_distributed.evaluation.perturbations import perturb, renaming
from rv_distributed.runtime.worker import choose_device

#: Whether an item's question was changed; beside its own fields.
_CHANGED: Final = "rv_question_changed"
#: What must not come with the model's arguments: code from a checkpoint is never run, and the model is the pair's own.
_REFUSED_ARGS: Final = ("pretrained", "trust_remote_code", "peft", "delta", "tokenizer", "batch_size", "device")


class Asked(NamedTuple):
    """A task that was found, and checked."""

    digest: str
    """Of its configuration and its items."""
    items: int
    perturbed: int
    """Items whose question the perturbation changes."""


def check_tasks(asks: Sequence[Ask], means: Means) -> dict[Ask, Asked]:
    """Load every task. Raises UsageError for arguments of the model that are none, and for folders of tasks that are
    missing; InputError with all tasks that do not exist, cannot be loaded, want a consent that was not given, or whose
    questions cannot be perturbed."""
    model_arguments(means)
    if lost := [path for path in means.task_paths if not os.path.isdir(path)]:
        raise UsageError(f"--task-path: there is no folder {', '.join(lost)}")
    manager = _manager([ask.task for ask in asks], means)
    found: dict[Ask, Asked] = {}
    problems: list[Problem] = []
    for ask in asks:
        try:
            tasks = _load(manager, ask)["tasks"]
        except InputError as error:
            problems += error.problems
            continue
        if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
            if not means.run_unsafe_code:
                what = f"runs code that the model writes ({', '.join(unsafe[:3])})"
                remedy = "Where that may be, in a sandbox, say so with --confirm-run-unsafe-code."
                problems.append(Problem(ask.task, what, remedy))
            elif os.environ.get(CONSENT_VARIABLE) != "1":
                what = "runs code that the model writes, which its metric wants a consent of its own for"
                problems.append(Problem(ask.task, what, f"Set {CONSENT_VARIABLE}=1 in the environment, too."))
        found[ask] = _asked(ask, tasks)
    if problems:
        raise InputError(list(dict.fromkeys(problems)))
    return found


def model_arguments(means: Means) -> dict[str, Any]:
    """The arguments of the harness's model. Raises UsageError."""
    given = _arguments(means.model_args, "--model-args")
    if refused := [name for name in given if name in _REFUSED_ARGS]:
        raise UsageError(f"--model-args: {', '.join(refused)} cannot be given here; the models are rv eval's own")
    return given


def _arguments(text: str, option: str) -> dict[str, Any]:
    from lm_eval.utils import simple_parse_args_string

    if not all("=" in part for part in text.split(",") if part):
        raise UsageError(f"{option}: {text!r} is not KEY=VALUE,…")
    found: dict[str, Any] = simple_parse_args_string(text)
    return found


def _manager(names: Sequence[str], means: Means) -> Any:
    """A task manager that knows the tasks; the harness's own 14,000 are read only when they are asked for."""
    # What they tell of their own progress is not of this command.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import datasets
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()

    manager = TaskManager(include_path=list(means.task_paths), include_defaults=False)
    known = set(manager.all_tasks)
    return manager if set(names) <= known else TaskManager(include_path=list(means.task_paths))


def _load(manager: Any, ask: Ask) -> dict[str, Any]:
    """What an ask means, as the harness's ``evaluate`` takes it: tasks and groups, set up as they are to be asked.

    Raises InputError.
    """
    if ask.task not in manager.all_tasks:
        remedy = "lm-eval ls tasks lists those of the harness; --task-path names a folder with your own."
        raise InputError([Problem(ask.task, "is no task of lm-evaluation-harness", remedy)])
    try:
        loaded = manager.load([ask.task])
    except Exception as error:
        remedy = "Check the task's files and, for its data, the network or the cache of data sets."
        raise InputError([Problem(ask.task, f"cannot be loaded: {_brief(error)}", remedy)]) from error
    for name, task in loaded["tasks"].items():
        if ask.gen_kwargs and task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", _arguments(ask.gen_kwargs, "--gen-kwargs"), update=True)
        if ask.num_fewshot is not None:
            task.set_config("num_fewshot", ask.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        if ask.perturbation is not None:
            _perturb(name, task, ask, ask.perturbation)
    return dict(loaded)


def _perturb(name: str, task: Any, ask: Ask, perturbation: str) -> None:
    """Put perturbed items in the place of a task's own. Raises InputError."""
    alone = "Leave out --perturb for it: evaluate it in a command of its own."
    if task.OUTPUT_TYPE != "generate_until":
        raise InputError([Problem(name, f"is {task.OUTPUT_TYPE}; only generative tasks are perturbed", alone)])
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError([Problem(name, "asks for code, of which any changed word is another program", alone)])
    docs = list(task.eval_docs)
    field = ask.field if ask.field is not None else _question_field(task, docs)
    if field is None or not all(isinstance(doc.get(field), str) for doc in docs):
        what = "has no field whose text is the question" if ask.field is None else f"has no text in the field {field!r}"
        raise InputError([Problem(name, what, "Name the field of its items with --perturb-field.")])
    changed = [_perturbed(doc, field, perturbation, ask.seed) for doc in docs]
    # What the harness asks for the items that are evaluated; examples are drawn from elsewhere and stay as they are.
    task.test_docs = task.validation_docs = lambda: changed


def _question_field(task: Any, docs: Sequence[Mapping[str, Any]]) -> str | None:
    """The longest field that stands in the prompt of each of the first items as it is."""
    first = docs[:5]
    texts = [str(task.doc_to_text(doc)) for doc in first]
    fits = [
        key
        for key in first[0]
        if all(
            isinstance(doc[key], str) and doc[key] and doc[key] in text for doc, text in zip(first, texts, strict=True)
        )
    ]
    return max(fits, key=lambda key: sum(len(doc[key]) for doc in first), default=None)


def _perturbed(doc: Mapping[str, Any], field: str, perturbation: str, seed: int) -> dict[str, Any]:
    text, renamed = perturb(perturbation, doc[field], seed)
    rest = {key: _renamed(value, renamed) for key, value in doc.items()}
    return {**rest, field: text, _CHANGED: text != doc[field]}


def _renamed(value: Any, renamed: Mapping[str, str]) -> Any:
    """A field of an item with the names that its question has now."""
    if isinstance(value, str):
        return renaming(value, renamed)
    return [_renamed(one, renamed) for one in value] if isinstance(value, list) else value


def _asked(ask: Ask, tasks: Mapping[str, Any]) -> Asked:
    digest, items, perturbed = blake3(), 0, 0
    for name, task in sorted(tasks.items()):
        docs = list(task.eval_docs)[: ask.limit]
        digest.update(json.dumps([name, task.dump_config(), docs], sort_keys=True, default=str).encode())
        items += len(docs)
        perturbed += sum(bool(doc.get(_CHANGED)) for doc in docs if isinstance(doc, Mapping))
    return Asked(digest.hexdigest(), items, perturbed)


class Harness:
    """Answers pairs, one after the other, with one model in memory."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._folder: str | None = None
        self._model: Any = None
        self._mover: Mover | None = None
        self._alpha: float | None = None
        self._tasks: dict[Ask, dict[str, Any]] = {}

    def answer(self, pair: Pair) -> Answers:
        """Have a model answer a task. Raises InputError, RunError, and whatever the harness raises."""
        began = time.monotonic()
        model, ask = self._loaded(pair.variant), pair.ask
        from lm_eval.evaluator import evaluate

        if ask not in self._tasks:
            self._tasks[ask] = _load(_manager([ask.task], self._means), ask)
        _seed(self._tasks[ask]["tasks"].values())
        with nullcontext() if self._means.shows_progress else redirect_stderr(io.StringIO()):
            results = evaluate(
                lm=model,
                task_dict=self._tasks[ask],
                limit=ask.limit,
                apply_chat_template=ask.apply_chat_template,
                fewshot_as_multiturn=ask.apply_chat_template,
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=self._means.run_unsafe_code,
            )
        metric, items = items_of(ask, results["samples"])
        aggregates = json.loads(json.dumps(results["results"], default=_plain))
        return Answers(metric, items, aggregates, time.monotonic() - began)

    def _loaded(self, variant: Variant) -> Any:
        """The harness's model of a variant."""
        if variant.folder != self._folder:
            self._folder = self._mover = self._model = None  # one model at a time
            self._model = _open_model(variant.folder, self._means)
            self._folder, self._alpha = variant.folder, 0.0
        if variant.alpha != self._alpha and variant.plan is not None:
            if self._mover is None:
                self._mover = Mover(self._model.model, variant.plan)
            self._alpha = None  # until it is whole
            self._mover.move((variant.alpha,))
            self._alpha = variant.alpha
        return self._model


def _open_model(folder: str, means: Means) -> Any:
    import transformers
    from lm_eval.api.registry import get_model

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = model_arguments(means)
    size = int(means.batch_size) if means.batch_size.isdigit() else means.batch_size
    more = {"batch_size": size, "max_batch_size": None, "device": choose_device(means.device)}
    return get_model(means.backend).create_from_arg_obj({"pretrained": folder, **given}, more)


def _seed(tasks: Iterable[Any]) -> None:
    """Set all generators as the harness's own command does, so that every model gets the same examples."""
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def items_of(ask: Ask, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, tuple[Item, ...]]:
    """The items of a task, or of all tasks of a group, with the score that was asked for, and that score's name.

    Raises RunError where it is no single number for each item.
    """
    items, metrics = [], []
    for task, rows in samples.items():
        metric, kept = _chosen(ask, task, rows)
        metrics.append(f"{metric},{kept}")
        items += [_item(task, row, metric) for row in rows if row["filter"] == kept]
    return "/".join(dict.fromkeys(metrics)), tuple(items)


def _chosen(ask: Ask, task: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The metric and the filter: those asked for, or else the task's first."""
    there = list(dict.fromkeys((metric, row["filter"]) for row in rows for metric in row["metrics"]))
    metric, _, kept = ask.metric.partition(",")
    fits = [one for one in there if metric in ("", one[0]) and kept in ("", one[1])]
    if not fits:
        names = "; ".join(",".join(one) for one in there)
        raise RunError(f"{task} has no score {ask.metric}, but {names}: choose with --metric")
    return fits[0]


def _item(task: str, row: Mapping[str, Any], metric: str) -> Item:
    score = row[metric]
    if not isinstance(score, (bool, int, float, np.number, np.bool_)):
        raise RunError(f"{task}: {metric} is no number for each item, so models cannot be compared by it; see --metric")
    doc = row["doc"]
    return Item(
        task=task,
        item=int(row["doc_id"]),
        prompt=str(row["arguments"][0][0]),
        wanted=_text(row["target"]),
        response=_text([one[0] if len(one) == 1 else one for one in row["resps"]]),
        answer=_text(row["filtered_resps"]),
        score=float(score),
        perturbed=isinstance(doc, Mapping) and bool(doc.get(_CHANGED)),
    )


def _text(value: Any) -> str:
    """A text as it is, also where it is the only one of a list; anything else as JSON."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, str) else json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """What JSON has no word for: NumPy's numbers as Python's, the rest as texts."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _brief(error: Exception) -> str:
    """The first line of an error of a library, whose others explain at length."""
    return one_line(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)
