"""Runs that stop, inputs that move, places that are taken: what is kept, what is redone, what is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from reference import Raw, combined, read_checkpoint, weights, write_checkpoint

import rv_distributed as rv
from rv_distributed.watching import ProgressCallback

MIB = 1 << 20
PLAN = rv.PlanOptions(piece_bytes=MIB, max_shard_bytes=2_700_000)
#: One stream makes the pieces in file order, so the first three lie at the start of the first shard.
ONE: dict[str, Any] = {"runtime": "local", "workers": 1}


class Stop(Exception):
    """Raised by a progress callback."""


class Inputs(NamedTuple):
    target: Path
    donor: Path
    reference: Path

    def run(
        self, out: Path, *, alpha: float = 0.7, progress: ProgressCallback | None = None, **options: Any
    ) -> rv.Manifest:
        run_options = rv.RunOptions(**{**ONE, **options})
        t, a, b = map(str, self)
        return rv.transfer(
            t, a, b, str(out), alpha=alpha, plan_options=PLAN, run_options=run_options, progress=progress
        )

    def stopped(self, out: Path, *, after: int = 3, alpha: float = 0.7) -> None:
        """Run until ``after`` pieces are finished."""

        def progress(now: rv.Progress) -> None:
            if now.pieces == after:
                raise Stop

        try:
            self.run(out, alpha=alpha, progress=progress)
        except Stop:
            assert not out.exists()
        else:
            pytest.fail("the run was not stopped")

    def wanted(self, alpha: float) -> dict[str, Raw]:
        t, a, b = (read_checkpoint(path) for path in self)
        return {name: combined(raw, [(a[name], b[name])], [alpha]) for name, raw in t.items()}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("pristine")
    rng = np.random.default_rng(59)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "first": ("BF16", (1150, 1001)),
        "second": ("F32", (650_003,)),
        "third": ("F16", (999,)),
    }
    folders = [
        write_checkpoint(
            root / name,
            {key: weights(rng, dtype, shape) for key, (dtype, shape) in shapes.items()},
            sidecars={"config.json": b"{}"},
        )
        for name in ("target", "donor", "reference")
    ]
    return Inputs(*map(Path, folders))


@pytest.fixture
def inputs(pristine: Inputs, tmp_path: Path) -> Iterator[Inputs]:
    """Copies that a test may damage, beside the output."""
    yield Inputs(*(Path(shutil.copytree(path, tmp_path / path.name)) for path in pristine))
    # pytest keeps the folders of its last runs, and a gigabyte a run is too much to keep.
    shutil.rmtree(tmp_path)


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file but those that tell how long the run took."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    del files["rv_manifest.json"], files["rv_pieces.parquet"]
    return files


def staged(out: Path) -> Path:
    return out.parent / f".{out.name}.rv"


def first_shard(out: Path) -> Path:
    return min(staged(out).glob("output-*/*.safetensors"))


def test_a_stopped_run_continues_and_ends_with_the_same_bytes(inputs: Inputs, tmp_path: Path) -> None:
    whole = inputs.run(tmp_path / "whole")
    inputs.stopped(tmp_path / "out")
    seen: list[rv.Progress] = []
    manifest = inputs.run(tmp_path / "out", progress=seen.append, workers=2)
    assert manifest.timings.pieces_kept >= 3
    assert seen[0].pieces == manifest.timings.pieces_kept + 1
    assert seen[-1].pieces == seen[-1].pieces_total == manifest.timings.pieces == whole.timings.pieces
    assert seen[-1].bytes_written == seen[-1].bytes_total == manifest.timings.bytes_written
    assert manifest.timings.bytes_written < whole.timings.bytes_written
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")
    assert not staged(tmp_path / "out").exists()


def test_a_run_may_be_stopped_again_and_again(inputs: Inputs, tmp_path: Path) -> None:
    inputs.run(tmp_path / "whole")
    for after in (1, 2, 4, 5):
        inputs.stopped(tmp_path / "out", after=after)
    assert inputs.run(tmp_path / "out").timings.pieces_kept >= 5
    assert content_of(tmp_path / "out") == content_of(tmp_path / "whole")


def test_no_stream_runs_on_when_the_run_has_failed(inputs: Inputs, tmp_path: Path) -> None:
    def progress(_: rv.Progress) -> None:
        raise Stop

    # The exception is kept, as a caller that prints it keeps it, and with it the frames of its traceback.
    with pytest.raises(Stop) as caught:
        inputs.run(tmp_path / "out", progress=progress)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("rv-stream")] == []
    inputs.run(tmp_path / "out", alpha=-1.0, restart=True)
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(-1.0)
    assert caught.value.args == ()


def flip_a_byte(out: Path, at: int) -> None:
    with first_shard(out).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))


def tear_the_last_record(out: Path) -> None:
    records = staged(out) / "records.jsonl"
    os.truncate(records, records.stat().st_size - 5)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        pytest.param(lambda out: flip_a_byte(out, MIB + 12_345), 2, id="a byte of the second piece"),
        pytest.param(lambda out: flip_a_byte(out, 20), 2, id="a byte of the header"),
        pytest.param(lambda out: flip_a_byte(out, first_shard(out).stat().st_size - 1), 2, id="the shard's last byte"),
        pytest.param(lambda out: os.truncate(first_shard(out), 2 * MIB + 5), 2, id="a truncated shard"),
        pytest.param(lambda out: first_shard(out).unlink(), 0, id="a lost shard"),
        pytest.param(tear_the_last_record, 2, id="a torn record"),
        pytest.param(lambda out: (staged(out) / "records.jsonl").unlink(), 0, id="no records"),
        pytest.param(lambda out: (staged(out) / "records.jsonl").write_bytes(b"\xff\n[]\n\n"), 0, id="no such records"),
    ],
)
def test_damaged_pieces_are_made_again(
    inputs: Inputs,
    tmp_path: Path,
    damage: Callable[[Path], object],
    kept: int,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inputs.stopped(tmp_path / "out")
    damage(tmp_path / "out")
    assert inputs.run(tmp_path / "out").timings.pieces_kept == kept
    # What has no record is as if it had never been finished.
    lost = 0 if "record" in request.node.callspec.id else 3 - kept
    assert (f"{lost} changed since and will be made again" in caplog.text) == bool(lost)
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.7)


def test_another_alpha_on_unfinished_pieces_is_refused_and_restart_begins_anew(inputs: Inputs, tmp_path: Path) -> None:
    inputs.stopped(tmp_path / "out")
    with pytest.raises(rv.OutputError, match=r"alpha: then 0\.7, now 0\.3.*--restart"):
        inputs.run(tmp_path / "out", alpha=0.3)
    assert not (tmp_path / "out").exists()
    assert inputs.run(tmp_path / "out", alpha=0.3, restart=True).timings.pieces_kept == 0
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.3)


def test_a_refusal_leaves_the_unfinished_run_as_it_was(inputs: Inputs, tmp_path: Path) -> None:
    inputs.stopped(tmp_path / "out")
    with pytest.raises(rv.OutputError):
        inputs.run(tmp_path / "out", alpha=0.3)
    assert inputs.run(tmp_path / "out").timings.pieces_kept >= 3


def test_an_input_that_changed_between_two_runs_is_named(inputs: Inputs, tmp_path: Path) -> None:
    inputs.stopped(tmp_path / "out")
    os.utime(inputs.donor / "model.safetensors", ns=(10**18, 10**18))
    with pytest.raises(rv.OutputError, match=r"size or time of .*donor/model\.safetensors changed"):
        inputs.run(tmp_path / "out")


@pytest.mark.parametrize("which", ["target", "donor", "reference"])
@pytest.mark.parametrize("how", ["touched", "replaced", "removed"])
def test_an_input_that_changes_during_the_run_stops_the_commit(
    inputs: Inputs, tmp_path: Path, which: str, how: str
) -> None:
    file: Path = getattr(inputs, which) / "model.safetensors"

    def progress(now: rv.Progress) -> None:
        if now.pieces != now.pieces_total:
            return
        if how == "touched":
            os.utime(file, ns=(10**18, 10**18))
        elif how == "replaced":
            shutil.copy2(file, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        else:
            file.rename(file.with_suffix(".gone"))

    with pytest.raises(rv.ChangedError, match=f"{which}/model.safetensors changed"):
        inputs.run(tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def stale(file: Path) -> Callable[..., os.stat_result]:
    """`os.stat` on a file system that has lost its hold of one file."""
    stat = os.stat

    def failing(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if path == str(file):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return stat(path, *args, **more)

    return failing


def test_a_storage_that_cannot_tell_whether_an_input_changed_costs_no_pieces(inputs: Inputs, tmp_path: Path) -> None:
    def progress(now: rv.Progress) -> None:
        if now.pieces == now.pieces_total:
            failing.setattr(os, "stat", stale(inputs.donor / "model.safetensors"))

    told = r"donor/model\.safetensors: Stale file handle"
    with pytest.MonkeyPatch.context() as failing, pytest.raises(rv.RunError, match=told) as caught:
        inputs.run(tmp_path / "out", progress=progress)
    assert type(caught.value) is rv.RunError
    manifest = inputs.run(tmp_path / "out")
    assert manifest.timings.pieces_kept == manifest.timings.pieces


def test_an_input_that_is_cut_short_during_the_run_fails_it(inputs: Inputs, tmp_path: Path) -> None:
    def progress(_: rv.Progress) -> None:
        os.truncate(inputs.donor / "model.safetensors", 5000)

    with pytest.raises(rv.RunError, match=r"donor/model\.safetensors"):
        inputs.run(tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_piece_stays_when_the_storage_cannot_tell_whether_its_input_changed(
    inputs: Inputs, tmp_path: Path
) -> None:
    file = inputs.donor / "model.safetensors"

    def progress(_: rv.Progress) -> None:
        os.truncate(file, 5000)
        failing.setattr(os, "stat", stale(file))

    told = "tensor .*ends at byte"
    with pytest.MonkeyPatch.context() as failing, pytest.raises(rv.PieceError, match=told) as caught:
        inputs.run(tmp_path / "out", progress=progress)
    assert caught.value.file == str(file)
    assert caught.value.tensors


def test_an_error_of_a_piece_is_told_though_the_storage_of_the_inputs_hangs(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()
    monkeypatch.setattr("rv_distributed.job.check_unchanged", lambda _: answer.wait())
    monkeypatch.setattr("rv_distributed.storage.ending.END_S", 1.0)

    def progress(_: rv.Progress) -> None:
        raise rv.PieceError("the store is away", "model.safetensors", 0, 1, ())

    try:
        with pytest.raises(rv.PieceError, match="the store is away"):
            inputs.run(tmp_path / "out", progress=progress)
    finally:
        answer.set()


def test_an_output_that_exists_is_refused_and_left_alone(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(rv.OutputError, match="already exists"):
        inputs.run(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert not staged(tmp_path / "out").exists()


def test_overwrite_replaces_the_whole_output_at_the_end(inputs: Inputs, tmp_path: Path) -> None:
    inputs.run(tmp_path / "out", alpha=0.3)
    before = content_of(tmp_path / "out")

    def progress(_: rv.Progress) -> None:
        assert content_of(tmp_path / "out") == before

    inputs.run(tmp_path / "out", overwrite=True, progress=progress)
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.7)
    assert not staged(tmp_path / "out").exists()


def test_what_comes_into_the_older_output_during_the_run_is_kept(inputs: Inputs, tmp_path: Path) -> None:
    inputs.run(tmp_path / "out", alpha=0.3)

    def progress(_: rv.Progress) -> None:
        (tmp_path / "out" / "notes.txt").write_text("precious")

    with pytest.raises(rv.OutputError, match=r"would delete: notes\.txt"):
        inputs.run(tmp_path / "out", overwrite=True, progress=progress)
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.3)
    (tmp_path / "out" / "notes.txt").unlink()
    assert inputs.run(tmp_path / "out", overwrite=True).timings.bytes_written == 0
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.7)


@pytest.mark.parametrize("out", ["target", "donor/inside", "reference/a/b", ".", "link", "link/inside"])
def test_an_output_that_overlaps_an_input_is_refused(inputs: Inputs, tmp_path: Path, out: str) -> None:
    (tmp_path / "link").symlink_to(inputs.donor)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(rv.OutputError, match="overlap"):
        inputs.run(tmp_path / out, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_place_that_another_run_holds_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    inputs.stopped(tmp_path / "out")
    with (staged(tmp_path / "out") / "lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(rv.OutputError, match="another run"):
            inputs.run(tmp_path / "out")
    assert inputs.run(tmp_path / "out").timings.pieces_kept >= 3


def test_a_disk_too_small_is_refused_before_anything_is_written(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=MIB))
    with pytest.raises(rv.OutputError, match=f"{MIB} are free"):
        inputs.run(tmp_path / "out")
    assert not staged(tmp_path / "out").exists()


def test_several_alphas_in_one_pass_give_the_outputs_of_single_runs(inputs: Inputs, tmp_path: Path) -> None:
    alphas = (0.7, 0.0, -1.0)
    target, donor, reference = map(str, inputs)
    recipe = rv.Recipe("transfer", target, (rv.Vector(donor, reference),), tuple((alpha,) for alpha in alphas))
    outs = [tmp_path / f"sweep-{alpha}" for alpha in alphas]
    manifests = rv.prepare(recipe, [str(out) for out in outs], PLAN, rv.RunOptions(**ONE)).run()
    for alpha, out, manifest in zip(alphas, outs, manifests, strict=True):
        assert manifest.alphas == (float(np.float32(alpha)),)
        assert read_checkpoint(out) == inputs.wanted(alpha), alpha


def test_a_torn_record_costs_one_piece_and_not_the_next_as_well(inputs: Inputs, tmp_path: Path) -> None:
    inputs.stopped(tmp_path / "out")
    tear_the_last_record(tmp_path / "out")
    inputs.stopped(tmp_path / "out", after=4)
    assert inputs.run(tmp_path / "out").timings.pieces_kept == 4


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_while_publishing_keeps_the_old_output_until_the_new_one_is_there(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    inputs.run(tmp_path / "out", alpha=0.3)
    calls: list[str] = []

    def rename(source: str, to: str) -> None:
        if len(calls) == renames:
            raise Stop
        calls.append(source)
        os.replace(source, to)

    with monkeypatch.context() as patched:
        # As on a file system that cannot exchange two names.
        patched.setattr("rv_distributed.storage.publish._exchange", lambda *_: False)
        patched.setattr(os, "rename", rename)
        with pytest.raises(Stop):
            inputs.run(tmp_path / "out", overwrite=True)
    old = tmp_path / "out" if renames == 0 else staged(tmp_path / "out") / "replaced"
    assert read_checkpoint(old) == inputs.wanted(0.3)
    assert inputs.run(tmp_path / "out", overwrite=True).timings.bytes_written == 0
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.7)
    assert not staged(tmp_path / "out").exists()


def test_a_crash_right_after_publishing_does_not_block_the_next_run(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr("rv_distributed.staging.posix.remove", remove)
        with pytest.raises(Stop):
            inputs.run(tmp_path / "out")
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.7)
    assert staged(tmp_path / "out").exists()
    inputs.run(tmp_path / "out", alpha=0.5, overwrite=True)
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.5)
    assert not staged(tmp_path / "out").exists()


def test_an_unreadable_plan_of_an_unfinished_run_is_an_output_error(inputs: Inputs, tmp_path: Path) -> None:
    inputs.stopped(tmp_path / "out")
    (staged(tmp_path / "out") / "plan.json").write_bytes(b'{"format":')
    with pytest.raises(rv.OutputError, match="--restart"):
        inputs.run(tmp_path / "out")
    inputs.run(tmp_path / "out", restart=True)
    assert read_checkpoint(tmp_path / "out") == inputs.wanted(0.7)


def test_a_small_file_of_the_target_that_vanishes_during_the_run_stops_the_commit(
    inputs: Inputs, tmp_path: Path
) -> None:
    def progress(_: rv.Progress) -> None:
        (inputs.target / "config.json").unlink(missing_ok=True)

    with pytest.raises(rv.ChangedError, match=r"target/config\.json"):
        inputs.run(tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()
