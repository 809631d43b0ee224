"""A loaded model that is moved has the bits of the files that ``rv apply`` and ``rv transfer`` write."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import write_model
from reference import Raw, read_checkpoint, write_checkpoint

import rv_distributed as rv
from rv_distributed.evaluation.in_memory import Mover
from rv_distributed.plan import PIECE_ALIGNMENT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
LOCAL = rv.RunOptions(runtime="local")
ALPHAS = (0.7, -1.0, 1.5)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")


def trio(folder: Path, **config: Any) -> tuple[str, str, str]:
    """Target, donor and reference."""
    names = ("target", "donor", "reference")
    target, donor, reference = (str(write_model(folder / name, n, **config)) for n, name in enumerate(names))
    return target, donor, reference


def assert_has_the_bits_of(model: Any, folder: str | Path) -> None:
    places = model.state_dict()
    for name, raw in read_checkpoint(folder).items():
        assert places[name].contiguous().view(torch.uint8).numpy().tobytes() == raw.data, name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_moved_in_memory_is_moved_on_disk(tmp_path: Path, dtype: str, tied: bool) -> None:
    target, donor, reference = trio(tmp_path, dtype=dtype, tie_word_embeddings=tied)
    # Small pieces, so that tensors are cut.
    options = rv.PlanOptions(piece_bytes=PIECE_ALIGNMENT)
    recipe = rv.Recipe("transfer", target, (rv.Vector(donor, reference),), tuple((alpha,) for alpha in ALPHAS))
    outs = [str(tmp_path / f"out{alpha}") for alpha in ALPHAS]
    job = rv.prepare(recipe, outs, options, LOCAL)
    job.run()
    model = load(Path(target))
    mover = Mover(model, job.plan)
    for alpha, out in zip(ALPHAS, outs, strict=True):
        mover.move((alpha,))
        assert_has_the_bits_of(model, out)
    mover.move((0.0,))
    assert_has_the_bits_of(model, target)
    if tied:
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_stored_vector_stochastic_rounding_and_a_selection_move_alike(tmp_path: Path) -> None:
    target, donor, reference = trio(tmp_path, dtype="bfloat16")
    rv.extract(donor, reference, str(tmp_path / "vector"), run_options=LOCAL)
    options = rv.PlanOptions(rounding="stochastic", seed=7, exclude=r"layers\.1\.mlp", compute_dtype="float64")
    recipe = rv.Recipe("apply", target, (rv.Vector(str(tmp_path / "vector")),), ((0.3,),))
    job = rv.prepare(recipe, [str(tmp_path / "out")], options, LOCAL)
    job.run()
    model = load(Path(target))
    Mover(model, job.plan).move((0.3,))
    assert_has_the_bits_of(model, tmp_path / "out")
    plain = read_checkpoint(target)
    assert any(raw.data == plain[name].data for name, raw in read_checkpoint(tmp_path / "out").items())


def test_tensors_larger_than_a_piece_are_moved_whole(tmp_path: Path) -> None:
    target, donor, reference = trio(tmp_path, dtype="bfloat16", intermediate_size=20_000)
    options = rv.PlanOptions(piece_bytes=PIECE_ALIGNMENT)
    recipe = rv.Recipe("transfer", target, (rv.Vector(donor, reference),), ((0.7,),))
    job = rv.prepare(recipe, [str(tmp_path / "out")], options, LOCAL)
    job.run()
    assert any(
        piece.start > tensor.start and piece.stop < tensor.stop
        for piece in job.plan.pieces
        for tensor in job.plan.tensors
    )
    model = load(Path(target))
    Mover(model, job.plan).move((0.7,))
    assert_has_the_bits_of(model, tmp_path / "out")


def plan_of(target: str, donor: str, reference: str, out: Path) -> rv.Job:
    recipe = rv.Recipe("transfer", target, (rv.Vector(donor, reference),), ((1.0,),))
    return rv.prepare(recipe, [str(out)], rv.PlanOptions(), LOCAL)


def test_a_model_that_is_not_its_checkpoint_is_refused(tmp_path: Path) -> None:
    target, donor, reference = trio(tmp_path)
    job = plan_of(target, donor, reference, tmp_path / "out")
    model = load(Path(target))
    with pytest.raises(rv.InputError, match=r"no such parameter.*--in-memory"):
        Mover(model.model, job.plan)  # whose names lack the first part
    model.extra = torch.nn.Linear(3, 3)
    with pytest.raises(rv.InputError, match=r"'extra.weight'.*no tensor of the checkpoint"):
        Mover(model, job.plan)
    eighths = replace(job.plan, tensors=tuple(one._replace(dtype="F8_E4M3") for one in job.plan.tensors))
    with pytest.raises(rv.InputError, match="is F8_E4M3, which is not moved in memory"):
        Mover(load(Path(target)), eighths)
    with pytest.raises(rv.InputError, match="has shape"):
        Mover(load(write_model(tmp_path / "wider", 1, intermediate_size=64)), job.plan)


def test_twins_of_a_tied_parameter_are_refused(tmp_path: Path) -> None:
    """A checkpoint may hold both; moved apart, they would not be one parameter any more."""
    folders = []
    for name, folder in zip(("target", "donor", "reference"), trio(tmp_path / "one"), strict=True):
        tensors = read_checkpoint(folder)
        both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
        config = {"config.json": (Path(folder) / "config.json").read_bytes()}
        folders.append(write_checkpoint(tmp_path / "both" / name, both, sidecars=config))
    job = plan_of(folders[0], folders[1], folders[2], tmp_path / "out")
    with pytest.raises(rv.InputError, match="is one parameter of the loaded model with"):
        Mover(load(Path(folders[0])), job.plan)


def test_inputs_that_change_meanwhile_are_found_out(tmp_path: Path) -> None:
    target, donor, reference = trio(tmp_path)
    job = plan_of(target, donor, reference, tmp_path / "out")
    mover = Mover(load(Path(target)), job.plan)
    weights = read_checkpoint(donor)
    shutil.rmtree(donor)
    write_checkpoint(Path(donor), {name: Raw(raw.dtype, raw.shape, raw.data) for name, raw in weights.items()})
    with pytest.raises(rv.ChangedError):
        mover.move((1.0,))


def test_a_model_in_another_dtype_than_its_files_gets_what_loading_would_give(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    target, donor, reference = trio(tmp_path)
    job = plan_of(target, donor, reference, tmp_path / "out")
    job.run()
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    Mover(model, job.plan).move((1.0,))
    wanted = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.bfloat16).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
