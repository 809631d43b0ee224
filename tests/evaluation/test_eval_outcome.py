"""Rows, differences and the choice of alpha, from answers made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rv_distributed.evaluation.model import Answers, Ask, Failed, Item, Pair, Variant, show_variant
from rv_distributed.evaluation.outcome import Outcome, is_development, outcome_of
from rv_distributed.evaluation.results import Evaluation, items_table, read_evaluation
from rv_distributed.evaluation.tables import HEADER, selection, task_tables

PLAIN, NOISY = Ask("sums"), Ask("sums", perturbation="noise")


def answers(scores: Sequence[float], *, perturbed: bool = False) -> Answers:
    items = (Item("sums", n, f"q{n}", "1", "out", "1", score, perturbed) for n, score in enumerate(scores))
    return Answers("exact_match,none", tuple(items), {}, 1.0)


def pairs_of(found: Mapping[tuple[Ask, float], Answers]) -> dict[Pair, Answers]:
    return {Pair(Variant(alpha, "m", f"{alpha}"), ask, f"{ask}{alpha}"): own for (ask, alpha), own in found.items()}


def outcome(found: Mapping[tuple[Ask, float], Answers], *, select: bool = False) -> Outcome:
    alphas = [alpha for alpha in dict.fromkeys(alpha for _, alpha in found) if alpha > 0]
    return outcome_of(pairs_of(found), select=select, candidates=alphas)


def test_models_are_named_as_sums() -> None:
    names = [show_variant(alpha) for alpha in (0.0, 1.0, -1.0, 0.5, -0.25)]
    assert names == ["target", "target + v", "target − v", "target + 0.5·v", "target − 0.25·v"]


def test_differences_are_paired_with_the_target_of_the_same_task() -> None:
    found = outcome(
        {
            (PLAIN, 0.0): answers([1, 0, 0, 1]),
            (NOISY, 0.0): answers([0, 0, 0, 0], perturbed=True),
            (PLAIN, 1.0): answers([1, 1, 1, 0]),
            (NOISY, 1.0): answers([1, 0, 0, 0], perturbed=True),
            (PLAIN, -1.0): answers([0, 0, 0, 0]),
        }
    )
    assert [(row.perturbation, row.alpha) for row in found.rows] == [
        (None, 0.0),
        (None, -1.0),
        (None, 1.0),
        ("noise", 0.0),
        ("noise", 1.0),
    ]
    target, minus, plus, noisy, noisy_plus = found.rows
    assert target.difference is None
    assert noisy.difference is None
    assert plus.difference is not None
    assert minus.difference is not None
    assert noisy_plus.difference is not None
    assert (plus.difference.mean, plus.difference.gained, plus.difference.lost) == (0.25, 2, 1)
    assert (minus.difference.mean, minus.difference.gained, minus.difference.lost) == (-0.5, 0, 2)
    assert noisy_plus.difference.mean == 0.25
    assert [row.perturbed for row in found.rows] == [0, 0, 0, 4, 4]


@pytest.mark.parametrize("target", [None, answers([1, 0, 0])], ids=["failed", "of other items"])
def test_without_the_targets_answers_to_the_same_items_there_is_no_difference(target: Answers | None) -> None:
    found = {(PLAIN, 1.0): answers([1, 1])} | ({(PLAIN, 0.0): target} if target is not None else {})
    row = outcome(found).rows[-1]
    assert (row.alpha, row.accuracy.mean, row.difference) == (1.0, 1.0, None)


def split_scores(count: int, development: float, test: float) -> Answers:
    """Scores that are one value on the development items and another on the others."""
    return answers([development if is_development("sums", n) else test for n in range(count)])


def test_alpha_is_chosen_on_one_half_and_reported_on_the_other() -> None:
    count = 400
    development = sum(is_development("sums", n) for n in range(count))
    assert 160 < development < 240
    found = outcome(
        {
            (PLAIN, 0.0): split_scores(count, 1, 0),  # the target is compared with, and never chosen
            (PLAIN, 0.5): split_scores(count, 1, 0),
            (PLAIN, 1.0): split_scores(count, 0, 1),
            (NOISY, 0.5): split_scores(count, 0, 0),  # nor does what is perturbed decide
            (NOISY, 1.0): split_scores(count, 1, 1),
            (PLAIN, -1.0): split_scores(count, 1, 1),
        },
        select=True,
    )
    assert found.split == "test"
    assert found.selected is not None
    assert found.selected.alpha == 0.5
    assert found.selected.development == {0.5: 1.0, 1.0: 0.0}
    assert (found.selected.development_items, found.selected.test_items) == (development, count - development)
    means = {(row.perturbation, row.alpha): row.accuracy.mean for row in found.rows}
    assert means[None, 0.5] == 0.0
    assert means[None, 1.0] == 1.0
    assert {row.accuracy.items for row in found.rows} == {count - development}


def test_of_alphas_as_good_as_each_other_the_smallest_is_chosen() -> None:
    found = outcome({(PLAIN, alpha): split_scores(40, 1, 1) for alpha in (1.5, 0.5, 1.0)}, select=True)
    assert found.selected is not None
    assert found.selected.alpha == 0.5


def test_an_alpha_that_lacks_a_task_is_not_chosen() -> None:
    other = Ask("more")
    found = {
        (PLAIN, 0.5): split_scores(40, 1, 1),
        (PLAIN, 1.0): split_scores(40, 0, 0),
        (other, 1.0): answers([0] * 40),
    }
    selected = outcome(found, select=True).selected
    assert selected is not None
    assert selected.alpha == 1.0
    with pytest.raises(ValueError, match="no alpha has answers to all tasks"):
        outcome({(PLAIN, 0.5): answers([1] * 40), (other, 1.0): answers([1] * 40)}, select=True)


def evaluation(**changed: Any) -> Evaluation:
    found = {
        (PLAIN, 0.0): split_scores(40, 0, 1),
        (PLAIN, 1.0): split_scores(40, 1, 0),
        (NOISY, 1.0): split_scores(40, 1, 1),
    }
    settings = {"created": "2026-01-01T00:00:00+00:00", "target": "/t", "vector": {"donor": "/a", "reference": "/b"}}
    more = {"settings": {"alphas": [0.0, 1.0]}, "versions": {"lm_eval": "0"}, "outcome": outcome(found, select=True)}
    return Evaluation(**{**settings, **more, "failed": (Failed("sums, target", "Error: why"),), **changed})


def test_results_are_read_as_they_were_written() -> None:
    written = evaluation()
    assert read_evaluation(json.dumps(written.document()).encode()) == written


@pytest.mark.parametrize(
    "spoil",
    [
        lambda found: found.update(schema_version=2),
        lambda found: found.pop("rows"),
        lambda found: found["rows"][0].update(alpha="1"),
        lambda found: found["rows"][0].update(accuracy=[]),
        lambda found: found["rows"][0]["accuracy"].update(mean=float("inf")),
        lambda found: found["rows"][0]["accuracy"].update(stderr=float("nan")),
        lambda found: found["rows"][-1].update(task=None, difference={"mean": 1}),
        lambda found: found.update(settings=[1]),
    ],
)
def test_results_that_were_not_written_by_us_are_refused(spoil: Any) -> None:
    document = evaluation().document()
    spoil(document)
    with pytest.raises(ValueError, match=r"."):
        read_evaluation(json.dumps(document).encode())
    for raw in (b"", b"[]", b"{}", b"\xff", b"[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            read_evaluation(raw)


def test_the_table_of_items_has_every_answer_of_every_model() -> None:
    found = pairs_of({(PLAIN, 0.0): answers([1, 0]), (NOISY, 0.5): answers([0, 1], perturbed=True)})
    rows = pq.read_table(pa.BufferReader(items_table(found))).to_pylist()
    assert [(row["asked"], row["perturbation"], row["alpha"], row["item"], row["score"]) for row in rows] == [
        ("sums", None, 0.0, 0, 1.0),
        ("sums", None, 0.0, 1, 0.0),
        ("sums", "noise", 0.5, 0, 0.0),
        ("sums", "noise", 0.5, 1, 1.0),
    ]
    whole = {"task": "sums", "prompt": "q1", "wanted": "1", "response": "out", "answer": "1", "perturbed": True}
    assert whole.items() <= rows[-1].items()
    assert rows[0]["metric"] == "exact_match,none"


def test_tables_say_what_was_chosen_and_on_how_many_items() -> None:
    found = evaluation().outcome
    assert found.selected is not None
    plain, noisy = task_tables(found)
    test_items = found.selected.test_items
    assert plain.title == f"sums: exact_match,none, {test_items} test items"
    assert [row[0] for row in plain.rows] == ["target", "target + v (chosen)"]
    assert plain.rows[1][1:5] == ("0.0000", "0.0000", "-1.0000", "[-1.0000, -1.0000]")
    assert all(len(row) == len(HEADER) for table in (plain, noisy) for row in table.rows)
    assert selection(found.selected).startswith("target + v was chosen by its accuracy on")
