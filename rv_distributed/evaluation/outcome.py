"""What all answers together say: a row for each model and task, differences to the target, and the choice of alpha."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from blake3 import blake3

from rv_distributed.evaluation.model import Answers, Ask, Item, Pair, show_variant
from rv_distributed.evaluation.statistics import Difference, Estimate, difference, estimate

Split = Literal["all", "test"]


class Row(NamedTuple):
    """A model on a task."""

    task: str
    perturbation: str | None
    alpha: float
    metric: str
    perturbed: int
    """Items whose question the perturbation changed."""
    accuracy: Estimate
    difference: Difference | None
    """To the target; None of the target itself, or where the target has no answers to the same items."""

    @property
    def model(self) -> str:
        return show_variant(self.alpha)

    @property
    def label(self) -> str:
        """Of the task."""
        return self.task if self.perturbation is None else f"{self.task} + {self.perturbation}"


class Selected(NamedTuple):
    """The alpha that was the best on the development items."""

    alpha: float
    development: Mapping[float, float]
    """The accuracy there of every alpha that was asked for: the mean over the tasks, without perturbations."""
    development_items: int
    test_items: int


class Outcome(NamedTuple):
    """What came of an evaluation."""

    rows: tuple[Row, ...]
    """Task by task, and in each the target first and then by alpha."""
    split: Split
    """Which items the rows are about."""
    selected: Selected | None


def is_development(task: str, item: int) -> bool:
    """Whether an item belongs to the half on which alpha is chosen: decided by a digest, the same in every run."""
    return blake3(f"{task} {item}".encode()).digest()[0] % 2 == 0


def outcome_of(answers: Mapping[Pair, Answers], *, select: bool, candidates: Iterable[float]) -> Outcome:
    """The rows of all pairs that have answers; with ``select``, of the test items, alpha being chosen from
    ``candidates`` on the others. Raises ValueError when there is nothing to choose by."""
    selected = _select(answers, list(candidates)) if select else None
    found: dict[Ask, list[tuple[float, Answers]]] = {}
    for pair, own in answers.items():
        kept = tuple(item for item in own.items if not (select and is_development(item.task, item.item)))
        if kept:
            found.setdefault(pair.ask, []).append((pair.variant.alpha, own._replace(items=kept)))
    rows = [row for ask, of_ask in found.items() for row in _rows(ask, of_ask)]
    return Outcome(tuple(rows), "test" if select else "all", selected)


def _rows(ask: Ask, found: Sequence[tuple[float, Answers]]) -> Iterable[Row]:
    target = next((own.items for alpha, own in found if alpha == 0.0), None)
    for alpha, own in sorted(found, key=lambda one: (one[0] != 0.0, one[0])):
        compared = None
        if alpha != 0.0 and target is not None and _keys(target) == _keys(own.items):
            compared = difference(_scores(own.items), _scores(target))
        perturbed = sum(item.perturbed for item in own.items)
        accuracy = estimate(_scores(own.items))
        yield Row(ask.task, ask.perturbation, alpha, own.metric, perturbed, accuracy, compared)


def _select(answers: Mapping[Pair, Answers], candidates: Sequence[float]) -> Selected:
    asks = list(dict.fromkeys(pair.ask for pair in answers))
    asks = [ask for ask in asks if ask.perturbation is None] or asks
    means: dict[float, float] = {}
    counts: dict[Ask, tuple[int, int]] = {}
    for alpha in candidates:
        own = {pair.ask: of for pair, of in answers.items() if pair.variant.alpha == alpha}
        development = {ask: _development(own[ask]) for ask in asks if ask in own}
        # An alpha that some task has no answers of cannot be compared with the others.
        if len(development) == len(asks) and all(development.values()):
            means[alpha] = sum(estimate(scores).mean for scores in development.values()) / len(asks)
            counts = {ask: (len(scores), len(own[ask].items) - len(scores)) for ask, scores in development.items()}
    if not means:
        raise ValueError("no alpha has answers to all tasks, to choose one by")
    # Of several that are as good, the one that moves the model least.
    best = max(means, key=lambda alpha: (means[alpha], -abs(alpha)))
    return Selected(best, means, *(sum(column) for column in zip(*counts.values(), strict=True)))


def _development(answers: Answers) -> list[float]:
    return [item.score for item in answers.items if is_development(item.task, item.item)]


def _keys(items: Sequence[Item]) -> list[tuple[str, int]]:
    return [(item.task, item.item) for item in items]


def _scores(items: Sequence[Item]) -> list[float]:
    return [item.score for item in items]
