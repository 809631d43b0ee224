"""Head and embedding that are one tensor in some inputs and two in others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Raw, assert_same, combined, read_checkpoint, weights
from refusal import ROLES, assert_refused, run_rv, transfer
from triples import ALPHA, applied, rows_of, transferred, write_models

import rv_distributed as rv
from rv_distributed.identity import identity_of

SHAPE = (512, 64)
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def models_of(
    folder: Path, heads: Mapping[str, str], tie: Mapping[str, bool | None] | None = None, *, keep: str = EMBEDDING
) -> Path:
    """Three models. Of each role, ``heads`` says whether its head is ``own``, ``same`` as the embedding, or ``none``;
    ``tie`` what its config says, which is otherwise that it is tied. A single tensor for both is called ``keep``."""
    rng, tensors = np.random.default_rng(11), {}
    for role in ROLES:
        embedding, own = weights(rng, "BF16", SHAPE), weights(rng, "BF16", SHAPE)
        tensors[role] = {
            keep if heads[role] == "none" else EMBEDDING: embedding,
            NORM: weights(rng, "BF16", (64,)),
            **({HEAD: own if heads[role] == "own" else embedding} if heads[role] != "none" else {}),
        }
    configs = {role: {"vocab_size": 512, "tie_word_embeddings": (tie or {}).get(role, True)} for role in ROLES}
    stated: dict[str, dict[str, Any]] = {
        role: {field: value for field, value in config.items() if value is not None} for role, config in configs.items()
    }
    return write_models(folder, tensors, configs=stated)


def wanted(models: Path) -> dict[str, Raw]:
    """The target's tensors with the vector, where a head that is not there is the embedding and the other way round."""
    t, a, b = (read_checkpoint(models / role) for role in ROLES)

    def side(tensors: dict[str, Raw], name: str) -> Raw:
        return tensors.get(name) or tensors[HEAD if name == EMBEDDING else EMBEDDING]

    return {name: combined(raw, [(side(a, name), side(b, name))], [ALPHA]) for name, raw in t.items()}


@pytest.mark.parametrize(
    ("heads", "matched"),
    [
        (("none", "none", "none"), ""),
        (("same", "none", "same"), f"donor: {EMBEDDING}, which it is tied to"),
        (("same", "same", "none"), f"reference: {EMBEDDING}, which it is tied to"),
        (("same", "none", "none"), f"donor, reference: {EMBEDDING}, which it is tied to"),
        (("none", "same", "none"), ""),
        (("none", "same", "same"), ""),
    ],
)
def test_tied_as_the_config_says_with_the_target_s_keys(tmp_path: Path, heads: tuple[str, ...], matched: str) -> None:
    models = models_of(tmp_path, dict(zip(ROLES, heads, strict=True)))
    found, said = transferred(models)
    assert_same(found, wanted(models))
    if HEAD in found:
        assert found[HEAD] == found[EMBEDDING]
        assert rows_of(models / "out")[HEAD].matched == matched
        assert not matched or f"{HEAD} as {matched.split(': ')[1]}" in said
    manifest = json.loads((models / "out" / "rv_manifest.json").read_bytes())
    left_out = {entry["tensor"]: entry["why"] for entry in manifest["left_out"]}
    assert left_out.keys() == ({HEAD} if heads[0] == "none" and heads != ("none",) * 3 else set())
    assert all("head and embedding are one here" in why for why in left_out.values())
    assert_same(applied(models), found)


def test_a_config_that_says_nothing_does_not_say_that_it_is_untied(tmp_path: Path) -> None:
    """Gemma 2's is so: tied, with the default of its architecture."""
    models = models_of(
        tmp_path, {"target": "same", "donor": "none", "reference": "none"}, {"donor": None, "reference": None}
    )
    assert_same(transferred(models)[0], wanted(models))


def test_what_is_stored_may_be_the_head(tmp_path: Path) -> None:
    models = models_of(tmp_path, {"target": "none", "donor": "same", "reference": "same"}, keep=HEAD)
    assert list(read_checkpoint(models / "target")) == [HEAD, NORM]
    assert_same(transferred(models)[0], wanted(models))
    other = models_of(tmp_path / "other", {"target": "same", "donor": "none", "reference": "none"}, keep=HEAD)
    assert_same(transferred(other)[0], wanted(other))


def test_a_head_that_is_missing_where_the_config_says_untied_is_missing(tmp_path: Path) -> None:
    heads = {"target": "own", "donor": "none", "reference": "own"}
    models = models_of(tmp_path, heads, dict.fromkeys(ROLES, False))
    told = f"{models / 'donor'}: tensor '{HEAD}': is missing, but the target and the reference have it. "
    assert_refused(models, transfer(models, models / "out"), (told, "--missing copy"))
    found, _ = transferred(models, "--missing", "copy")
    assert found[HEAD] == read_checkpoint(models / "target")[HEAD]


def test_another_tensor_of_the_embedding_s_shape_is_tied_to_nothing(tmp_path: Path) -> None:
    """An embedding of a prediction layer, for instance."""
    models = models_of(tmp_path, {"target": "same", "donor": "none", "reference": "none"})
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    tensors["target"]["model.layers.1.embed_tokens.weight"] = tensors["target"][EMBEDDING]
    config = {"vocab_size": 512, "tie_word_embeddings": True}
    again = write_models(tmp_path / "again", tensors, configs=dict.fromkeys(ROLES, config))
    found, _ = transferred(again)
    for name in (HEAD, "model.layers.1.embed_tokens.weight"):
        assert found[name] == tensors["target"][name]
        assert rows_of(again / "out")[name].why == "not in any vector"


def test_a_head_for_other_ends_is_tied_to_nothing(tmp_path: Path) -> None:
    """Though it has a row for every token."""
    models = models_of(tmp_path, dict.fromkeys(ROLES, "none"))
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    tensors["target"]["my_value_head.weight"] = weights(np.random.default_rng(3), "BF16", SHAPE)
    config = {"vocab_size": 512, "tie_word_embeddings": True}
    again = write_models(tmp_path / "again", tensors, configs=dict.fromkeys(ROLES, config))
    done = run_rv(*transfer(again, again / "out", f"--alpha={ALPHA}"))
    assert (done.status, done.stderr) == (0, "")
    found = read_checkpoint(again / "out")
    assert found.pop("my_value_head.weight") == tensors["target"]["my_value_head.weight"]
    assert_same(found, wanted(models))


@pytest.mark.parametrize("role", ROLES)
def test_a_head_that_differs_although_the_config_says_tied_is_reported_and_taken_as_it_is(
    tmp_path: Path, role: str
) -> None:
    models = models_of(tmp_path, {each: "own" if each == role else "same" for each in ROLES})
    done = run_rv(*transfer(models, models / "out", f"--alpha={ALPHA}"))
    assert done.status == 0
    told = f"{models / role}: config.json says that head and embedding are tied, but '{EMBEDDING}' and '{HEAD}' differ"
    assert told in done.stderr
    assert done.stderr.count("are tied") == 1
    assert_same(read_checkpoint(models / "out"), wanted(models))
    assert told in json.loads(run_rv("inspect", models / role, "--json").stdout)["warnings"][0]


def test_heads_that_are_no_different_or_are_said_to_be_are_not_reported(tmp_path: Path) -> None:
    same = models_of(tmp_path / "same", dict.fromkeys(ROLES, "same"))
    assert run_rv(*transfer(same, same / "out")).stderr == ""
    own = models_of(tmp_path / "own", dict.fromkeys(ROLES, "own"), dict.fromkeys(ROLES, False))
    assert run_rv(*transfer(own, own / "out")).stderr == ""


def test_the_config_decides_and_the_identity_of_a_plan_knows(tmp_path: Path) -> None:
    """The donor's is in no fingerprint."""
    models = models_of(tmp_path, {"target": "same", "donor": "none", "reference": "same"})
    vector = rv.Vector(str(models / "donor"), str(models / "reference"))
    recipe = rv.Recipe("transfer", str(models / "target"), (vector,), ((ALPHA,),))

    def identity(tied: bool) -> dict[str, Any]:
        config = {"vocab_size": 512, "tie_word_embeddings": tied}
        (models / "donor" / "config.json").write_text(json.dumps(config))
        options, how = rv.PlanOptions(missing="copy"), rv.RunOptions(runtime="local")
        return identity_of(rv.prepare(recipe, [str(models / "out")], options, how).plan, 0)

    assert identity(True) == identity(True)
    assert identity(True)["inputs"] == identity(False)["inputs"]
    assert identity(True) != identity(False)
