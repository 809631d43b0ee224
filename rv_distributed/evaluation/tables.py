"""An outcome in words and tables: the same on the terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from rv_distributed.evaluation.model import show_variant
from rv_distributed.evaluation.outcome import Outcome, Row, Selected
from rv_distributed.evaluation.statistics import CONFIDENCE
from rv_distributed.units import plural

HEADER: Final = ("model", "accuracy", "error", "− target", f"{CONFIDENCE:.0%} interval", "gained", "lost", "p")


class TaskTable(NamedTuple):
    """One task, with a row a model."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    """Under `HEADER`."""


def task_tables(outcome: Outcome) -> Iterator[TaskTable]:
    """A table for each task and each way of asking it."""
    found: dict[tuple[str, str | None], list[Row]] = {}
    for row in outcome.rows:
        found.setdefault((row.task, row.perturbation), []).append(row)
    chosen = outcome.selected.alpha if outcome.selected is not None else None
    for rows in found.values():
        first = rows[0]
        items = plural(first.accuracy.items, "test item" if outcome.split == "test" else "item")
        changed = f", {first.perturbed} of them asked differently" if first.perturbation is not None else ""
        yield TaskTable(f"{first.label}: {first.metric}, {items}{changed}", tuple(_cells(row, chosen) for row in rows))


def _cells(row: Row, chosen: float | None) -> tuple[str, ...]:
    accuracy, compared = row.accuracy, row.difference
    model = row.model + (" (chosen)" if row.alpha == chosen else "")
    own = (model, f"{accuracy.mean:.4f}", f"{accuracy.stderr:.4f}" if accuracy.stderr is not None else "–")
    if compared is None:
        return (*own, "", "", "", "", "")
    interval = f"[{compared.low:+.4f}, {compared.high:+.4f}]"
    p = f"{compared.p:.2g}" if compared.p is not None else "–"
    return (*own, f"{compared.mean:+.4f}", interval, f"{compared.gained:,}", f"{compared.lost:,}", p)


def selection(selected: Selected) -> str:
    """How alpha was chosen."""
    means = ", ".join(f"{show_variant(alpha)} {mean:.4f}" for alpha, mean in sorted(selected.development.items()))
    seen, others = plural(selected.development_items, "development item"), plural(selected.test_items, "item")
    return (
        f"{show_variant(selected.alpha)} was chosen by its accuracy on {seen} ({means}); "
        f"the accuracies shown are those on the other {others}"
    )
