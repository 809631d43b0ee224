"""Preparing and running jobs: options, places of outputs, and what a crash while publishing leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from reference import Raw, combined, extracted, read_checkpoint, weights, write_checkpoint

import rv_distributed as rv
from rv_distributed import reduce
from rv_distributed.checkpoint.pieces import PieceRow, write_pieces
from rv_distributed.runtime.model import WorkerShape
from rv_distributed.storage import PosixFolder
from rv_distributed.watching import ProgressCallback

LOCAL = rv.RunOptions(runtime="local", workers=1)
OVERWRITE = rv.RunOptions(runtime="local", workers=1, overwrite=True)
CONFIG = b'{"torch_dtype": "bfloat16"}'


class Inputs(NamedTuple):
    """Three small checkpoints of one tensor."""

    target: str
    donor: str
    reference: str

    def transfer(
        self, out: Path, alpha: float, how: rv.RunOptions, progress: ProgressCallback | None = None
    ) -> rv.Manifest:
        return rv.transfer(*self, str(out), alpha=alpha, run_options=how, progress=progress)

    def wanted(self, alpha: float) -> dict[str, Raw]:
        t, a, b = (read_checkpoint(path)["x"] for path in self)
        return {"x": combined(t, [(a, b)], [alpha])}

    def recipe(self, *alphas: float) -> rv.Recipe:
        vector = rv.Vector(self.donor, self.reference)
        return rv.Recipe("transfer", self.target, (vector,), tuple((alpha,) for alpha in alphas))


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    rng = np.random.default_rng(67)
    return Inputs(
        *(
            write_checkpoint(tmp_path / role, {"x": weights(rng, "BF16", (40, 25))}, sidecars={"config.json": CONFIG})
            for role in ("target", "donor", "reference")
        )
    )


def staged(out: Path) -> Path:
    return out.parent / f".{out.name}.rv"


def crash_between_the_renames(inputs: Inputs, out: Path) -> None:
    """Leave what `publish` leaves when the process dies after it has moved the old output (alpha 0.3) away and
    before it has moved the new one (alpha 0.7) into its place."""

    class Crash(Exception):
        pass

    def progress(now: rv.Progress) -> None:
        assert now.pieces == now.pieces_total
        raise Crash

    inputs.transfer(out, 0.3, LOCAL)
    with pytest.raises(Crash):
        inputs.transfer(out, 0.7, OVERWRITE, progress)
    out.rename(staged(out) / "replaced")


def test_an_overwrite_cut_between_its_renames_ends_with_the_new_output_when_run_again(
    inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    crash_between_the_renames(inputs, out)
    manifest = inputs.transfer(out, 0.7, OVERWRITE)
    assert (manifest.timings.pieces_kept, manifest.timings.bytes_written) == (manifest.timings.pieces, 0)
    assert read_checkpoint(out) == inputs.wanted(0.7)
    assert rv.verify(str(out)) == manifest
    assert not staged(out).exists()


def test_an_overwrite_cut_between_its_renames_gives_the_old_output_back_without_overwrite(
    inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    crash_between_the_renames(inputs, out)
    for _ in range(2):
        with pytest.raises(rv.OutputError, match="already exists") as caught:
            inputs.transfer(out, 0.7, LOCAL)
        assert caught.value.exit_status == 2
        assert read_checkpoint(out) == inputs.wanted(0.3)
        rv.verify(str(out))
    assert not (staged(out) / "replaced").exists()
    assert inputs.transfer(out, 0.7, OVERWRITE).timings.bytes_written == 0
    assert read_checkpoint(out) == inputs.wanted(0.7)


@pytest.mark.parametrize(
    "outs",
    [("p", "p/q"), ("p/q", "p"), ("p/q/r", "p"), ("p", "p"), ("p", "p/"), ("p", "./p/../p/q")],
    ids=" and ".join,
)
def test_outputs_of_a_sweep_that_lie_in_each_other_are_refused(
    inputs: Inputs, tmp_path: Path, outs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for how in (LOCAL, OVERWRITE):
        with pytest.raises(rv.UsageError, match="lies in"):
            rv.prepare(inputs.recipe(0.5, 0.7), outs, rv.PlanOptions(), how)
    assert sorted(os.listdir(tmp_path)) == before


def test_outputs_whose_names_only_begin_alike_are_no_outputs_in_each_other(inputs: Inputs, tmp_path: Path) -> None:
    outs = [str(tmp_path / name) for name in ("p", "p.q", "pq")]
    job = rv.prepare(inputs.recipe(0.5, 0.7, 1.0), outs, rv.PlanOptions(), LOCAL)
    assert job.outs == tuple(outs)


def test_a_sweep_looks_at_its_inputs_once_and_before_each_output_again(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    states = PosixFolder.states

    def counted(folder: PosixFolder, names: Iterable[str]) -> dict[str, str]:
        looks.append(folder.uri)
        return states(folder, names)

    monkeypatch.setattr(PosixFolder, "states", counted)
    outs = [str(tmp_path / name) for name in ("one", "two")]
    rv.prepare(inputs.recipe(0.5, 0.7), outs, rv.PlanOptions(), LOCAL).run()
    assert sorted(looks) == sorted([*inputs] * 3)


def test_an_input_that_changes_between_two_commits_stops_the_second(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = Path(inputs.donor, "model.safetensors")
    commits: list[Path] = []

    def touch(pieces: Sequence[PieceRow]) -> bytes:
        if commits:
            os.utime(donor, ns=(10**18, 10**18))
        commits.append(donor)
        return write_pieces(pieces)

    monkeypatch.setattr(reduce, "write_pieces", touch)
    outs = [tmp_path / name for name in ("one", "two")]
    with pytest.raises(rv.ChangedError, match=r"donor/model\.safetensors changed"):
        rv.prepare(inputs.recipe(0.5, 0.7), [str(out) for out in outs], rv.PlanOptions(), LOCAL).run()
    assert [out.exists() for out in outs] == [True, False]


@pytest.mark.parametrize(
    ("asked", "dtype", "name"),
    [(None, "float32", "F32"), ("auto", "float32", "F32"), ("bfloat16", "bfloat16", "BF16")],
    ids=["by default", "with auto", "with bfloat16"],
)
def test_a_vector_is_stored_in_float32_unless_another_dtype_is_asked_for(
    inputs: Inputs, tmp_path: Path, asked: str | None, dtype: str, name: str
) -> None:
    options = rv.PlanOptions() if asked is None else rv.PlanOptions(dtype=asked)
    assert rv.PlanOptions().dtype == "auto"
    out = tmp_path / "vector"
    manifest = rv.extract(inputs.donor, inputs.reference, str(out), plan_options=options, run_options=LOCAL)
    a, b = (read_checkpoint(path)["x"] for path in (inputs.donor, inputs.reference))
    assert read_checkpoint(out) == {"x": extracted(a, b, name)}
    assert manifest.options["dtype"] == dtype
    assert json.loads((out / "config.json").read_bytes()) == {"torch_dtype": dtype}
    exact, stored = extracted(a, b, "F32"), read_checkpoint(out)["x"]
    assert (manifest.totals.inexact_elements == 0) == (name == "F32")
    assert len(stored.data) == len(exact.data) // (1 if name == "F32" else 2)


def test_a_transfer_keeps_the_target_s_dtype_unless_another_is_asked_for(inputs: Inputs, tmp_path: Path) -> None:
    for options, name in ((rv.PlanOptions(), "BF16"), (rv.PlanOptions(dtype="float32"), "F32")):
        job = rv.prepare(inputs.recipe(0.7), [str(tmp_path / "out")], options, LOCAL)
        assert [tensor.dtype for tensor in job.plan.tensors] == [name]


@pytest.mark.parametrize(("alpha", "formula"), [(0.7, "O = T + 0.7·(A − B)"), (-0.3, "O = T − 0.3·(A − B)")])
def test_the_formula_is_written_as_people_write_it(inputs: Inputs, tmp_path: Path, alpha: float, formula: str) -> None:
    manifest = inputs.transfer(tmp_path / "out", alpha, LOCAL)
    assert manifest.formula == formula
    assert formula in (tmp_path / "out" / "README.md").read_text()


def test_a_run_has_the_buffers_that_fit_its_workers_not_those_that_were_expected(tmp_path: Path) -> None:
    rng = np.random.default_rng(68)
    many = (write_checkpoint(tmp_path / name, {"x": weights(rng, "BF16", (2000, 2000))}) for name in "tab")
    inputs = Inputs(*many)
    options = rv.PlanOptions(piece_bytes=1 << 20)
    job = rv.prepare(inputs.recipe(0.5), [str(tmp_path / "out")], options, rv.RunOptions(runtime="ray"))
    expected, found = job._worker_config([], WorkerShape(1, False)), job._worker_config([], WorkerShape(4, True))
    assert (expected.streams, expected.cpus, expected.chunk_bytes) == (3, 1, 4 << 20)
    assert expected.buffer_bytes == job.sizing.buffer_bytes
    assert (found.streams, found.cpus, found.chunk_bytes) == (6, 4, 8 << 20)
