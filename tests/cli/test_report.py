"""``rv report``: where it writes, what it refuses, and its Markdown."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from reference import weights, write_checkpoint
from refusal import Done, run_rv

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(str(folder))
    target, donor, reference = (str(folder / role) for role in ("target", "donor", "reference"))
    for alpha in (0.3, 1.0):
        rv.transfer(target, donor, reference, str(folder / f"out-{alpha}"), alpha=alpha)
    return folder


def report(folder: Path, *args: str | Path) -> Done:
    """``rv report ARGS`` in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return run_rv("report", *args)
    finally:
        os.chdir(before)


def test_a_page_is_written_here_under_the_output_s_name_and_never_over_another(outs: Path, tmp_path: Path) -> None:
    done = report(tmp_path, outs / "out-0.3")
    page = tmp_path / "out-0.3.report.html"
    assert (done.status, done.stdout) == (0, f"{page}\n")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    again = report(tmp_path, outs / "out-0.3")
    assert again.status == 2
    assert "--overwrite" in again.stderr
    page.write_text("old")
    assert report(tmp_path, outs / "out-0.3", "--overwrite").status == 0
    assert page.stat().st_size > 1_000_000
    assert run_rv("verify", outs / "out-0.3").status == 0


def test_markdown_says_what_the_manifest_says(outs: Path, tmp_path: Path) -> None:
    done = report(tmp_path, outs / "out-0.3", "--format", "md", "--out", "-")
    manifest = rv.verify(str(outs / "out-0.3"))
    assert done.status == 0
    assert done.stdout.startswith("# out-0.3\n")
    assert f"alpha 0.3 realised as {manifest.totals.realised_alpha:.4g}" in done.stdout
    assert f"| manifest | {manifest.digest} |" in done.stdout
    for entry in manifest.inputs:
        assert f"| {entry.role} | {entry.uri.replace('_', chr(92) + '_')} |" in done.stdout
    assert "## What was not computed" not in done.stdout or manifest.totals.copied
    assert not list(tmp_path.iterdir())


def test_several_outputs_are_compared_in_the_order_of_their_alphas(outs: Path, tmp_path: Path) -> None:
    done = report(tmp_path, outs / "out-1.0", outs / "out-0.3", "--format", "md")
    assert done.status == 0
    text = (tmp_path / "comparison.report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| out")]
    assert [row.split(" | ")[:2] for row in rows[1:]] == [["| out-0.3", "0.3"], ["| out-1.0", "1"]]


@pytest.mark.parametrize(
    "place", ["out-0.3/report.html", "out-0.3/deep/report.html", "nowhere/report.html", "out-1.0/report.html"]
)
def test_places_where_a_report_may_not_go_are_refused(outs: Path, tmp_path: Path, place: str) -> None:
    refused = report(tmp_path, outs / "out-0.3", "--out", outs / place)
    assert refused.status == 2
    assert "--out" in refused.stderr
    assert run_rv("verify", outs / "out-0.3").status == 0


def test_what_is_no_output_or_was_changed_or_cannot_be_compared_is_refused(outs: Path, tmp_path: Path) -> None:
    other = {"x": weights(np.random.default_rng(1), "BF16", (8,))}
    vector = write_checkpoint(tmp_path / "x", other)
    rv.apply(vector, {vector: 0.5}, str(tmp_path / "other"))
    damaged = shutil.copytree(outs / "out-0.3", tmp_path / "damaged")
    table = damaged / "rv_tensors.parquet"
    table.write_bytes(table.read_bytes()[:-1] + b"0")
    without = shutil.copytree(outs / "out-0.3", tmp_path / "without")
    (without / "rv_tensors.parquet").unlink()
    edited = shutil.copytree(outs / "out-0.3", tmp_path / "edited")
    manifest = edited / "rv_manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"created": "2', b'"created": "3'))
    for args, status, told in (
        ([tmp_path / "nothing"], 2, "does not exist"),
        ([outs / "target"], 2, "rv_manifest.json"),
        ([damaged], 2, "damaged/rv_tensors.parquet: differs from what was written. rv verify"),
        ([without], 2, "without/rv_tensors.parquet: is missing. rv verify"),
        ([edited], 2, "edited/rv_manifest.json: differs from what was written"),
        ([outs / "out-0.3", outs / "out-0.3"], 2, "is given twice"),
        ([outs / "out-0.3", tmp_path / "other"], 2, "out-0.3. Compare outputs of one target"),
    ):
        refused = report(tmp_path, *args)
        assert refused.status == status, refused.stderr
        assert told in refused.stderr
    assert not list(tmp_path.glob("*.html"))
