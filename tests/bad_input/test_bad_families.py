"""Checkpoints that are good, but not for each other: found when planning, all at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import read_checkpoint, weights, write_checkpoint
from refusal import CONFIG, INDEX, ROLES, SHAPES, assert_refused, make_models, run_rv, transfer

BASE: dict[str, Any] = json.loads(CONFIG)


def set_config(folder: Path, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**BASE, **fields}))
    return folder / "config.json"


FACTS = {
    "model_type": ("'qwen2'", "'llama'", "give inputs of one model_type."),
    "num_hidden_layers": ("3", "2", "give inputs with the same layers."),
    "vocab_size": (
        "17",
        "16",
        "Give --vocab-mismatch overlap to add the rows that all inputs have, or leave the tensors that have",
    ),
}


@pytest.mark.parametrize("role", ["donor", "reference"])
@pytest.mark.parametrize("field", FACTS)
def test_a_config_that_differs_is_refused_with_both_files_and_both_values(
    tmp_path: Path, field: str, role: str
) -> None:
    models = make_models(tmp_path)
    value, expected, remedy = FACTS[field]
    config = set_config(models / role, **{field: json.loads(value.replace("'", '"'))})
    what = f"{config}: has {field} {value}, but {models / 'target' / 'config.json'} has {expected}. "
    assert_refused(models, transfer(models, models / "out"), (what, remedy))


@pytest.mark.parametrize("field", FACTS)
def test_a_nested_text_config_is_compared(tmp_path: Path, field: str) -> None:
    models = make_models(tmp_path)
    value, expected, remedy = FACTS[field]
    for role in ROLES:
        set_config(models / role, text_config=BASE)
    config = set_config(models / "donor", text_config={**BASE, field: json.loads(value.replace("'", '"'))})
    shown = "text_config.model_type" if field == "model_type" else field
    what = f"{config}: has {shown} {value}, but {models / 'target' / 'config.json'} has {expected}. "
    assert_refused(models, transfer(models, models / "out"), (what, remedy))


def test_extract_compares_its_two_checkpoints(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    config = set_config(models / "reference", model_type="qwen2")
    args: list[str | Path] = ["extract", "--donor", models / "donor", "--reference", models / "reference"]
    what = f"{config}: has model_type 'qwen2', but {models / 'donor' / 'config.json'} has 'llama'. "
    assert_refused(models, [*args, "--out", models / "out"], what)


def extract(models: Path) -> Path:
    vector = models / "vector"
    args: list[str | Path] = ["--donor", models / "donor", "--reference", models / "reference", "--out", vector]
    assert run_rv("extract", *args).status == 0
    return vector


@pytest.mark.parametrize("field", FACTS)
def test_a_stored_vector_is_refused_for_a_target_of_another_family(tmp_path: Path, field: str) -> None:
    models = make_models(tmp_path)
    vector = extract(models)
    value, stored, remedy = FACTS[field]
    target = set_config(models / "target", **{field: json.loads(value.replace("'", '"'))})
    args: list[str | Path] = ["apply", "--target", models / "target", "--vector", vector, "--out", models / "out"]
    what = f"{vector / 'config.json'}: has {field} {stored}, but {target} has {value}. "
    assert_refused(models, args, (what, remedy))


def test_every_misfit_of_all_inputs_is_told_at_once(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    set_config(models / "donor", model_type="qwen2", num_hidden_layers=3, vocab_size=17)
    set_config(models / "reference", vocab_size=17, quantization_config={"quant_method": "awq"})
    rng = np.random.default_rng(0)
    (models / "donor" / INDEX).unlink()
    for path in (models / "donor").glob("*.safetensors"):
        path.unlink()
    made = Path(write_checkpoint(tmp_path / "other", {n: weights(rng, "BF16", (*s, 2)) for n, s in SHAPES.items()}))
    (made / "model.safetensors").rename(models / "donor" / "model.safetensors")
    made.rmdir()
    done = assert_refused(models, transfer(models, models / "out"), "rv: 9 problems with the inputs:\n")
    lines = done.stderr.splitlines()[1:]
    assert [line.split(": ")[0].rsplit("/", 2)[1:] for line in lines[:5]] == [
        ["reference", "config.json"],
        *[["donor", "config.json"]] * 3,
        ["reference", "config.json"],
    ]
    wanted = ["quant_method", "vocab_size", "num_hidden_layers", "model_type", "has shape"]
    assert all(any(text in line for line in lines) for text in wanted)


def test_misfits_are_told_with_the_damage_of_another_input(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    set_config(models / "donor", model_type="qwen2")
    (models / "reference" / INDEX).write_text("{")
    assert_refused(models, transfer(models, models / "out"), "is not JSON", "has model_type 'qwen2'")


@pytest.mark.parametrize("content", [None, b"{}", b'{"model_type": null, "text_config": []}'])
def test_a_config_that_is_missing_or_says_nothing_is_no_problem(tmp_path: Path, content: bytes | None) -> None:
    models = make_models(tmp_path)
    for role in ("target", "donor"):
        (models / role / "config.json").unlink()
        if content is not None:
            (models / role / "config.json").write_bytes(content)
    done = run_rv(*transfer(models, models / "out"))
    assert done.status == 0, done.stderr


def test_a_target_without_a_config_is_warned_of(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    for role in ROLES:
        (models / role / "config.json").unlink()
    args = transfer(models, models / "out", "--dry-run")
    told = f"{models / 'target'}: holds no config.json, so the output has none, and transformers cannot load it: put "
    done = run_rv(*args)
    assert (done.status, done.stderr.count("warning: ")) == (0, 1)
    assert done.stderr.startswith(f"warning: {told}")
    (warning,) = json.loads(run_rv(*args, "--json").stdout)["plan"]["warnings"]
    assert warning.startswith(told)
    assert run_rv("extract", *args[3:-3], "--out", models / "out", "--dry-run").stderr == ""


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000], ids=["cut", "a list", "no text", "deep"])
def test_a_malformed_config_is_refused(tmp_path: Path, content: bytes) -> None:
    models = make_models(tmp_path)
    (models / "reference" / "config.json").write_bytes(content)
    told = (f"{models / 'reference' / 'config.json'}: is not ", "JSON", "Download the file again.")
    assert_refused(models, transfer(models, models / "out"), told)


def test_another_vocabulary_is_accepted_when_its_tensors_are_left_out(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    set_config(models / "donor", vocab_size=17)
    assert_refused(models, transfer(models, models / "out", "--exclude", "norm"), "has vocab_size 17")
    assert run_rv(*transfer(models, models / "out", "--exclude", "embed")).status == 0


def test_a_vector_with_alpha_0_may_be_of_any_family(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    set_config(models / "donor", model_type="qwen2")
    assert run_rv(*transfer(models, models / "out", "--alpha", "0")).status == 0


def test_a_shape_that_differs_is_refused_by_its_tensor(tmp_path: Path) -> None:
    models = make_models(tmp_path, shards=1)
    rng = np.random.default_rng(3)
    shutil.rmtree(models / "donor")
    write_checkpoint(models / "donor", {n: weights(rng, "BF16", s[::-1]) for n, s in SHAPES.items()})
    what = f"{models / 'donor'}: tensor 'embed': has shape [8, 16], but [16, 8] in the target. "
    remedy = "Check that the inputs are the same model, or leave the tensor out with --exclude."
    assert_refused(models, transfer(models, models / "out"), (what, remedy))


def test_models_with_nothing_in_common_are_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    rng = np.random.default_rng(3)
    shutil.rmtree(models / "target")
    write_checkpoint(models / "target", {f"h.{n}": weights(rng, "BF16", s) for n, s in SHAPES.items()})
    others = f"{models / 'donor'}, {models / 'reference'}"
    what = f"{models / 'target'}: has no tensor in common with {others}. "
    assert_refused(models, transfer(models, models / "out"), (what, "Check that all inputs are models of one"))


def linked_folder(donor: Path, reference: Path) -> None:
    reference.symlink_to(donor)


def copied(donor: Path, reference: Path) -> None:
    shutil.copytree(donor, reference, copy_function=shutil.copyfile)


def linked_files(donor: Path, reference: Path) -> None:
    reference.mkdir()
    for path in donor.iterdir():
        (reference / path.name).symlink_to(path)


def hard_links(donor: Path, reference: Path) -> None:
    shutil.copytree(donor, reference, copy_function=os.link)


@pytest.mark.parametrize("how", [linked_folder, copied, linked_files, hard_links], ids=lambda how: how.__name__)
def test_a_donor_that_is_its_reference_is_refused(tmp_path: Path, how: Callable[[Path, Path], None]) -> None:
    models = make_models(tmp_path)
    shutil.rmtree(models / "reference")
    how(models / "donor", models / "reference")
    what = f"{models / 'donor'}: is the donor and holds the same weights as the reference, {models / 'reference'}: "
    remedy = "Give two different checkpoints as --donor and --reference."
    assert_refused(models, transfer(models, models / "out"), (what, "the vector would be zero. ", remedy))


@pytest.mark.parametrize("target", [(), ("--target",)])
def test_one_folder_as_donor_and_reference_is_refused(tmp_path: Path, target: tuple[str, ...]) -> None:
    models = make_models(tmp_path)
    donor = models / "donor"
    args: list[str | Path] = ["transfer", *target, models / "target"] if target else ["extract"]
    done = assert_refused(models, [*args, "--donor", donor, "--reference", donor, "--out", models / "out"])
    assert done.stderr.startswith(f"rv: {donor}: is the donor and holds the same weights as the reference, {donor}: ")
    assert done.stderr.count("\n") == 1


def test_checkpoints_that_differ_only_where_no_sample_is_taken_make_a_vector(tmp_path: Path) -> None:
    """Their fingerprints are the same: only their bytes tell them apart."""
    rng = np.random.default_rng(5)
    tensors = {"frozen": weights(rng, "BF16", (512, 512)), "tuned": weights(rng, "BF16", (8,))}
    write_checkpoint(tmp_path / "reference", tensors)
    write_checkpoint(tmp_path / "donor", {**tensors, "tuned": weights(rng, "BF16", (8,))})
    args: list[str | Path] = ["--donor", tmp_path / "donor", "--reference", tmp_path / "reference"]
    done = run_rv("extract", *args, "--out", tmp_path / "out")
    assert (done.status, done.stderr) == (0, "")


def test_other_files_of_the_same_weights_are_warned_of_after_the_run(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    shutil.rmtree(models / "reference")
    write_checkpoint(models / "reference", read_checkpoint(models / "donor"), sidecars={"config.json": CONFIG})
    done = run_rv(*transfer(models, models / "out", "--json"))
    assert done.status == 0
    warning = f"{models / 'out'}: the vector was zero in all 4 computed tensors. "
    assert f"warning: {warning}Check that donor and reference are" in done.stderr
    (told,) = json.loads(done.stdout)["warnings"]
    assert told.startswith(warning)
    others = make_models(tmp_path / "others")
    assert run_rv(*transfer(others, models / "out2")).stderr == ""
    assert run_rv(*transfer(others, models / "out-{alpha}", "--alpha", "0,1")).stderr == ""
