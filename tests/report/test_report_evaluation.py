"""``rv report --eval``: the accuracies and differences that were measured, as a figure and as tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from refusal import run_rv

from rv_distributed.demo import make_checkpoints
from rv_distributed.evaluation.model import Failed
from rv_distributed.evaluation.outcome import Outcome, Row
from rv_distributed.evaluation.results import Evaluation
from rv_distributed.evaluation.statistics import Difference, Estimate

HOSTILE = "</script><b>sums"


def row(task: str, perturbation: str | None, alpha: float, mean: float, stderr: float | None) -> Row:
    compared = Difference(mean - 0.25, -0.125, 0.5, 3, 1, 0.625) if alpha else None
    return Row(task, perturbation, alpha, "exact_match,none", 2, Estimate(mean, stderr, 8), compared)


ROWS = (
    row(HOSTILE, None, 0.0, 0.25, 0.1),
    row(HOSTILE, None, -1.0, 0.125, 0.05),
    row(HOSTILE, None, 1.0, 0.75, None),
    row(HOSTILE, "noise", 0.0, 0.2, 0.1),
    row(HOSTILE, "noise", 1.0, 0.5, 0.2),
    row("alone", None, 0.0, 0.5, 0.1),
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The folder of an evaluation."""
    folder = tmp_path / "eval"
    folder.mkdir()
    made = {"donor": "/models/a?token=hunter2", "reference": "/models/b"}
    failed = (Failed("more, target + v", "out of memory"),)
    evaluation = Evaluation(
        "2026-01-01T00:00:00+00:00",
        "/t",
        made,
        {"alphas": [0, 1]},
        {"lm_eval": "9"},
        Outcome(ROWS, "all", None),
        failed,
    )
    (folder / "rv_eval.json").write_text(json.dumps(evaluation.document()))
    return folder


def figures_of(page: str) -> dict[str, Any]:
    """What plotly is given to draw."""
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


def test_the_figure_holds_the_accuracies_with_their_errors(results: Path) -> None:
    page = results.parent / "page.html"
    assert run_rv("report", "--eval", results, "--out", page).status == 0
    text = page.read_text(encoding="utf-8")
    figures = figures_of(text)
    clean, noise = figures["eval0"]["data"]
    assert (clean["x"], clean["y"]) == ([-1.0, 0.0, 1.0], [0.125, 0.25, 0.75])
    assert clean["error_y"]["array"] == pytest.approx([1.96 * 0.05, 1.96 * 0.1, 0.0])
    assert (noise["name"], noise["x"], noise["y"]) == ("noise", [0.0, 1.0], [0.2, 0.5])
    assert "eval1" not in figures, "of one model there is no curve"
    assert "There is one model only." in text
    assert "<b>sums" not in text
    assert "hunter2" not in text


def test_the_tables_hold_the_differences(results: Path) -> None:
    done = run_rv("report", "--eval", results, "--format", "md", "--out", "-")
    assert done.status == 0, done.stderr
    assert r"| target + v | 0.7500 | – | +0.5000 | \[-0.1250, +0.5000\] | 3 | 1 | 0.62 |" in done.stdout
    assert "| target − v | 0.1250 | 0.0500 | -0.1250 |" in done.stdout
    assert "Not evaluated: more, target + v" in done.stdout
    assert "2 of them asked differently" in done.stdout
    assert "hunter2" not in done.stdout


def test_an_evaluation_stands_beside_the_output_that_it_is_about(results: Path) -> None:
    folder = results.parent
    make_checkpoints(str(folder))
    inputs = [text for role in ("target", "donor", "reference") for text in (f"--{role}", str(folder / role))]
    assert run_rv("transfer", *inputs, "--out", folder / "out", "--runtime", "local").status == 0
    done = run_rv("report", folder / "out", "--eval", results, "--format", "md", "--out", "-")
    assert done.stdout.startswith("# out\n")
    assert "\n# Evaluation\n" in done.stdout
    page = folder / "page.html"
    assert run_rv("report", folder / "out", "--eval", results, "--out", page).status == 0
    names = list(figures_of(page.read_text(encoding="utf-8")))
    assert names[0] == "eval0"
    assert {"heat", "realised"} <= set(names)


@pytest.mark.parametrize("spoil", ["gone", "torn", "strange"])
def test_what_is_no_evaluation_is_refused(results: Path, spoil: str) -> None:
    path = results / "rv_eval.json"
    if spoil == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if spoil == "torn" else b"{}")
    done = run_rv("report", "--eval", results, "--format", "md", "--out", "-")
    assert done.status == 2
    assert "rv_eval.json" in done.stderr
    assert "rv eval" in done.stderr


def test_nothing_to_report_on_is_refused() -> None:
    done = run_rv("report")
    assert done.status == 2
    assert "--eval" in done.stderr
