"""The section on an evaluation: accuracy over alpha, and the tables of ``rv eval``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import plotly.graph_objects as go

from rv_distributed.errors import InputError, Problem, one_line
from rv_distributed.evaluation.outcome import Row
from rv_distributed.evaluation.results import RESULTS_FILE, Evaluation, read_evaluation
from rv_distributed.evaluation.statistics import FORMULA
from rv_distributed.evaluation.tables import HEADER, selection, task_tables
from rv_distributed.recipe import show_alpha
from rv_distributed.report.drawing import COLOURS, Figure, frame, label, line
from rv_distributed.report.tables import Table, fit

_MOST_BYTES: Final = 50_000_000
#: More than anybody looks at, so that no file makes a page of any size.
_MOST_TASKS: Final = 60
_MOST_CONDITIONS: Final = 6
#: Two-sided, of the normal distribution, for the bars of the figures.
_QUANTILE: Final = 1.96


def read_results(folder: str) -> Evaluation:
    """The outcome in an evaluation's folder. Raises InputError."""
    path = os.path.join(folder, RESULTS_FILE)
    try:
        if os.path.getsize(path) > _MOST_BYTES:
            raise ValueError("is larger than any evaluation")
        with open(path, "rb") as file:
            return read_evaluation(file.read())
    except OSError as error:
        what, remedy = f"cannot be read: {error.strerror or error}", "Give the --out of an rv eval that has finished."
    except ValueError as error:
        what, remedy = str(error), "Run rv eval again: what it has finished is kept."
    raise InputError([Problem(path, what, remedy)])


def words_of(evaluation: Evaluation) -> list[str]:
    """What was evaluated, how alpha was chosen, and what the numbers are."""
    made = ", ".join(f"{role} {uri}" for role, uri in evaluation.vector.items())
    words = [f"target {evaluation.target}{', ' if made else ''}{made} · evaluated {evaluation.created}"]
    if evaluation.outcome.selected is not None:
        words.append(selection(evaluation.outcome.selected))
    words.append(FORMULA)
    if evaluation.failed:
        words.append(f"Not evaluated: {'; '.join(one.pair for one in evaluation.failed[:_MOST_TASKS])}")
    return [one_line(text) for text in words]


def evaluation_tables(evaluation: Evaluation) -> Iterator[Table]:
    """A table a task, and one of what was asked for."""
    tables = list(task_tables(evaluation.outcome))
    for table in tables[:_MOST_TASKS]:
        yield Table(table.title, HEADER, table.rows)
    settings = [(name, str(value)) for name, value in evaluation.settings.items() if name != "tasks"]
    versions = list(evaluation.versions.items())
    yield Table(fit("How it was evaluated", min(len(tables), _MOST_TASKS), len(tables)), ("", ""), settings + versions)


def curves_of(evaluation: Evaluation) -> Iterator[Figure]:
    """A figure a task: its accuracy over alpha, with a line for each way of asking it."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in evaluation.outcome.rows:
        found.setdefault(row.task, {}).setdefault(row.perturbation or "as it is", []).append(row)
    for number, (task, conditions) in enumerate(list(found.items())[:_MOST_TASKS]):
        title = f"{task}: accuracy over alpha"
        if len({row.alpha for rows in conditions.values() for row in rows}) < 2:
            yield Figure(f"eval{number}", title, "", None, "There is one model only.")
            continue
        items = "test items" if evaluation.outcome.split == "test" else "items"
        caption = (
            f"At 0 is the target. Bars are 95 % intervals of each accuracy alone, over the {items}; the table has "
        )
        caption += "those of the differences, which are narrower."
        yield Figure(f"eval{number}", title, caption, _curves(conditions))


def _curves(conditions: dict[str, list[Row]]) -> go.Figure:
    traces = []
    for number, (condition, rows) in enumerate(list(conditions.items())[:_MOST_CONDITIONS]):
        rows = sorted(rows, key=lambda row: row.alpha)
        names = [f"{label(condition)}<br>alpha {show_alpha(row.alpha)}" for row in rows]
        trace = line([row.alpha for row in rows], [row.accuracy.mean for row in rows], names, number, label(condition))
        errors = [_QUANTILE * (row.accuracy.stderr or 0.0) for row in rows]
        trace.update(error_y={"type": "data", "array": errors, "color": COLOURS[number], "thickness": 1})
        traces.append(trace)
    figure = frame(traces, x="alpha", legend=len(conditions) > 1)
    return figure.update_yaxes(tickformat=".0%", rangemode="tozero")
