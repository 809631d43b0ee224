"""What is read before it is shown: outputs that lack something, were changed, or were never ours."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from altered import altered, manifest_of, pieces_of, rows_of
from reference import Raw, weights, write_checkpoint

import rv_distributed as rv
from rv_distributed.checkpoint.pieces import PieceRow
from rv_distributed.errors import InputError
from rv_distributed.report import report
from rv_distributed.report.page import _embedded
from rv_distributed.report.reading import names_of, read_output

NAMES = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(3)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(1)
    made = [{name: weights(rng, "BF16", (8, 16)) for name in NAMES} for _ in range(3)]
    made[0]["ids"] = Raw("I64", (3,), bytes(24))
    t, a, b = (write_checkpoint(folder / name, one) for name, one in zip("tab", made, strict=True))
    rv.transfer(t, a, b, str(folder / "out"), alpha=0.5, run_options=rv.RunOptions(runtime="local"))
    return folder / "out"


def without_pieces(out: Path, place: Path) -> Path:
    made = altered(out, place)
    (made / "rv_pieces.parquet").unlink()
    return made


def older(out: Path, place: Path) -> Path:
    """Of a version that wrote no pieces."""
    files = tuple(file for file in manifest_of(out).files if file.name != "rv_pieces.parquet")
    made = altered(out, place, files=files)
    (made / "rv_pieces.parquet").unlink()
    return made


def other_columns(out: Path, place: Path) -> Path:
    return altered(out, place, pieces=(out / "rv_tensors.parquet").read_bytes())


def no_times(out: Path, place: Path) -> Path:
    return altered(out, place, pieces=[piece._replace(done_s=math.nan) for piece in pieces_of(out)])


def kept(out: Path, place: Path) -> Path:
    return altered(out, place, pieces=[PieceRow(*piece[:4]) for piece in pieces_of(out)])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (without_pieces, "rv_pieces.parquet is missing"),
        (older, "made without rv_pieces.parquet"),
        (other_columns, "is not a table of pieces: it has other columns"),
        (no_times, "holds times that are none"),
        (kept, "All pieces were kept from an earlier run"),
    ],
)
def test_without_pieces_all_else_is_reported_and_the_reason_told(
    out: Path, tmp_path: Path, make: Any, told: str
) -> None:
    place = make(out, tmp_path / "out")
    page = report([str(place)])
    assert told in page
    assert 'id="speed"' not in page
    assert 'id="heat"' in page
    text = report([str(place)], "md").replace("\\", "")
    assert f"- Bytes written a second: {'Not known: ' if 'kept' not in told else ''}" in text
    assert told in text
    assert "## By worker" not in text
    assert "## By layer" in text


def test_changed_pieces_are_refused(out: Path, tmp_path: Path) -> None:
    place = altered(out, tmp_path / "out")
    (place / "rv_pieces.parquet").write_bytes(b"changed")
    with pytest.raises(InputError, match=r"rv_pieces\.parquet: differs from what was written\. rv verify"):
        report([str(place)])


@pytest.mark.parametrize(
    "more",
    [
        {"rule": "burn"},
        {"rule": None},
        {"why": None},
        {"matched": None},
        {"dtype": None},
        {"ulps": (1, 2)},
        {"shape": (None,)},
    ],
)
def test_rows_that_are_not_ours_are_refused_though_their_digest_fits(
    out: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    rows = rows_of(out)
    place = altered(out, tmp_path / "out", rows=[rows[0]._replace(**more), *rows[1:]])
    with pytest.raises(InputError, match=r"rv_tensors\.parquet: is not a table of tensors: the row of"):
        report([str(place)])


def test_a_manifest_without_the_options_of_ours_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rv_manifest\.json: lacks the options stats, rounding"):
        report([str(altered(out, tmp_path / "out", options={"dtype": "auto"}))])


def test_numbers_that_are_none_are_dashes_and_not_zeros(out: Path, tmp_path: Path) -> None:
    odd: dict[str, Any] = {"v_norm": 1e200, "t_norm": math.inf, "realised_alpha": math.nan, "relative_error": 1e200}
    rows = [row._replace(**odd) if row.name == NAMES[1] else row for row in rows_of(out)]
    text = report([str(altered(out, tmp_path / "out", rows=rows))], "md")
    (layer,) = [line for line in text.splitlines() if line.startswith("| 1 |")][:1]
    assert layer.split(" | ")[1:4] == ["–", "–", "–"]
    assert 'id="heat"' in report([str(tmp_path / "out")])


def test_unmeasured_outputs_of_a_sweep_have_dashes_and_no_figures(out: Path, tmp_path: Path) -> None:
    target, donor, reference = (str(out.parent / name) for name in "tab")
    outs = [str(tmp_path / f"out-{alpha}") for alpha in (0.3, 0.7)]
    for alpha, place in zip((0.3, 0.7), outs, strict=True):
        options = rv.PlanOptions(stats="none")
        run_options = rv.RunOptions(runtime="local")
        rv.transfer(target, donor, reference, place, alpha=alpha, plan_options=options, run_options=run_options)
    page, text = report(outs), report(outs, "md")
    assert 'class="plot"' not in page
    assert page.count("Not measured: it takes --stats full.") == 5
    assert "0.00%" not in page
    assert f"| out-0.3 | 0.3 | nearest, auto |{' – |' * 6}" in text


def test_outputs_of_one_name_are_told_apart(out: Path, tmp_path: Path) -> None:
    places = [altered(out, tmp_path / folder / "out") for folder in ("one", "two")]
    outputs = [read_output(str(place)) for place in places]
    assert names_of(outputs) == ["one/out", "two/out"]
    assert names_of(outputs[:1]) == ["out"]
    assert "| two/out | 0.5 |" in report([str(place) for place in places], "md")


def of_deepseek() -> list[str]:
    parts = ("gate_proj", "up_proj", "down_proj")
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{part}.weight" for n in range(119) for e in range(256) for part in parts
    ]
    return [*names[:90_990], *(f"model.layers.{n}.self_attn.o_proj.weight" for n in range(10))]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(of_deepseek, "By layer", marks=pytest.mark.slow),
        pytest.param(
            lambda: [f"weird{n}.weight" for n in range(91_000)],
            "Only 80 of 91,000 modules, with the longest vectors, are shown",
            marks=pytest.mark.slow,
        ),
        (lambda: [f"layers.{n}.module{n}.weight" for n in range(20_000)], "By layer: 300 of 20,000"),
        (lambda: ["layers." + "9" * 5000 + ".a.weight"], "By module"),
    ],
    ids=["91000 tensors", "91000 modules", "20000 layers", "a layer of 5000 digits"],
)
def test_pages_stay_small_and_soon_made(out: Path, tmp_path: Path, make: Callable[[], list[str]], told: str) -> None:
    names = make()
    row = next(row for row in rows_of(out) if row.rule == "combine")
    pieces = [PieceRow(n, "s", 0, 9, f"node{n % 2048}:1", 1, n / 100, 1.0, 1.0, 1.0, 9, 9) for n in range(20_000)]
    totals = replace(manifest_of(out).totals, tensors=len(names), combined=len(names))
    rows = [row._replace(name=name, v_norm=1.0 + n % 97) for n, name in enumerate(names)]
    place = altered(out, tmp_path / "out", rows=rows, pieces=pieces, totals=totals)
    began = time.monotonic()
    page = report([str(place)])
    assert time.monotonic() - began < 30
    assert len(page.encode()) < 6_000_000
    assert told in page
    assert "By worker: 20 of 2,048" in page
    assert len(report([str(place)], "md")) < 200_000


def test_nothing_in_a_figure_can_end_its_script() -> None:
    """Though labels are escaped before they come there."""
    document = {"</script><!--": ["&lt;", "<script>", "\u2028"]}
    text = _embedded(document)
    assert not set("<&\u2028") & set(text)
    assert json.loads(text) == document
