"""Whose small files go with an output, and which never do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import weights
from refusal import ROLES, assert_refused, run_rv, transfer
from triples import ok, transferred, write_models

import rv_distributed as rv

OF_TRAINING = {
    "optimizer.pt": "training state",
    "trainer_state.json": "training state",
    "checkpoint-500/tokenizer.json": "training state",
    "runs/host/events.out.tfevents.1": "training log",
    "all_results.json": "training log",
    "pytorch_model.bin": "weights",
    "README.md": "an output has its own",
}


def models_of(folder: Path, **more: dict[str, bytes]) -> Path:
    rng = np.random.default_rng(29)
    tensors = {role: {"norm": weights(rng, "F32", (16,)), "embed": weights(rng, "F32", (4, 4))} for role in ROLES}
    sidecars = {
        role: {
            "tokenizer_config.json": role.encode(),
            "chat_template.jinja": role.encode(),
            "code/modeling.py": role.encode(),
            f"only-{role}.txt": b"",
            **more.get(role, {}),
        }
        for role in ROLES
    }
    config = {"vocab_size": 4}
    return write_models(folder, tensors, shards=1, configs=dict.fromkeys(ROLES, config), sidecars=sidecars)


def owners(models: Path, out: str = "out") -> dict[str, str]:
    files = ("tokenizer_config.json", "chat_template.jinja", "code/modeling.py")
    return {name: (models / out / name).read_text() for name in files}


@pytest.mark.parametrize("role", ROLES)
def test_the_small_files_are_those_of_the_input_that_is_asked_for(tmp_path: Path, role: str) -> None:
    models = models_of(tmp_path)
    _, said = transferred(models, "--sidecars-from", role)
    taken = {"tokenizer_config.json": role, "chat_template.jinja": role}
    assert owners(models) == taken | {"code/modeling.py": "target"}
    assert [path.name for path in (models / "out").glob("only-*")] == [f"only-{role}.txt"]
    assert (models / "out" / "config.json").read_bytes() == (models / "target" / "config.json").read_bytes()
    assert ("but for config and code" in said) == (role != "target")
    ok("verify", models / "out")


def test_a_vector_gets_the_donor_s_or_the_reference_s(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    inputs = ("extract", "--donor", models / "donor", "--reference", models / "reference", "--runtime", "local")
    ok(*inputs, "--out", models / "vector")
    assert set(owners(models, "vector").values()) == {"donor"}
    ok(*inputs, "--out", models / "other", "--sidecars-from", "reference")
    assert owners(models, "other")["chat_template.jinja"] == "reference"
    assert owners(models, "other")["code/modeling.py"] == "donor"
    apply = ("apply", "--target", models / "target", "--vector", models / "vector", "--runtime", "local")
    ok(*apply, "--out", models / "out", "--sidecars-from", "vector")
    assert owners(models)["chat_template.jinja"] == "donor"


def test_an_input_that_there_is_not_is_a_usage_error(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    args = transfer(models, models / "out", "--sidecars-from", "vector")
    assert_refused(models, args, "rv: --sidecars-from vector: transfer has target, donor, reference")
    vectors = {str(models / "donor"): 0.5, str(models / "reference"): 0.5}
    options = rv.PlanOptions(sidecars_from="vector")
    with pytest.raises(rv.UsageError, match="several inputs are that"):
        rv.apply(str(models / "target"), vectors, str(models / "out"), plan_options=options)


def test_a_tokenizer_with_more_tokens_than_the_output_has_rows_is_refused(tmp_path: Path) -> None:
    tokens = {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": 4}}}).encode()}
    models = models_of(tmp_path, donor=tokens)
    args = transfer(models, models / "out", "--sidecars-from", "donor")
    assert_refused(models, args, f"{models / 'donor'}: has a tokenizer with ids up to 4, but the output has the 4 rows")
    ok(*transfer(models, models / "out"))


def test_what_is_left_out_is_listed_with_reasons(tmp_path: Path) -> None:
    models = models_of(tmp_path, target=dict.fromkeys(OF_TRAINING, b"x"), donor={"donor.log": b"x"})
    plan: dict[str, Any] = json.loads(ok(*transfer(models, models / "out", "--dry-run", "--json")).stdout)["plan"]
    listed = [{"file": name, "why": why} for name, why in sorted(OF_TRAINING.items())]
    assert plan["files_left_out"] == listed
    assert {entry["from"] for entry in plan["sidecars"]} == {str(models / "target")}
    _, said = transferred(models)
    assert "not copied  7 files: README.md (an output has its own), all_results.json (training log), " in said
    manifest = json.loads((models / "out" / "rv_manifest.json").read_bytes())
    assert manifest["files_left_out"] == listed
    assert not [name for name in OF_TRAINING if name != "README.md" and (models / "out" / name).exists()]
    document = json.loads(run_rv("inspect", models / "donor", "--json").stdout)
    assert document["left_out"] == [{"file": "donor.log", "why": "training log"}]


def test_a_small_file_of_the_donor_that_changes_during_the_run_stops_the_commit(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    target, donor, reference = (str(models / role) for role in ROLES)

    def change(_: rv.Progress) -> None:
        (models / "donor" / "chat_template.jinja").write_text("another")

    options, how = rv.PlanOptions(sidecars_from="donor"), rv.RunOptions(runtime="local")
    with pytest.raises(rv.ChangedError, match="chat_template"):
        rv.transfer(
            target, donor, reference, str(models / "out"), plan_options=options, run_options=how, progress=change
        )
    assert not (models / "out").exists()


def test_a_link_to_elsewhere_is_looked_for_where_the_files_come_from(tmp_path: Path) -> None:
    models = models_of(tmp_path / "models")
    (tmp_path / "secret").write_text("x")
    (models / "donor" / "notes.txt").symlink_to(tmp_path / "secret")
    ok(*transfer(models, models / "out"))
    args = transfer(models, models / "other", "--sidecars-from", "donor")
    assert_refused(models, args, f"{models / 'donor' / 'notes.txt'}: is a link to {tmp_path / 'secret'}, outside")


def test_the_card_states_the_licence_of_the_files_that_go_along(tmp_path: Path) -> None:
    cards = {
        role: {"README.md": f"---\nlicense: {licence}\n---\n".encode()}
        for role, licence in zip(ROLES, ("mit", "gpl", "bsd"), strict=True)
    }
    models = models_of(tmp_path, **cards)
    ok(*transfer(models, models / "out", "--sidecars-from", "donor"))
    assert "license: gpl" in (models / "out" / "README.md").read_text()
