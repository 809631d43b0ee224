"""One tensor under two names: wrappers that are recognised, and rules that are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference import Raw, assert_same, combined, read_checkpoint, weights
from refusal import ROLES, assert_refused, transfer
from triples import ALPHA, applied, ok, rows_of, transferred, write_models

SHAPES = {
    "model.embed_tokens.weight": (300, 40),
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.10.self_attn.q_proj.weight": (40, 40),
    "model.norm.weight": (40,),
    "lm_head.weight": (300, 40),
}
Rename = Callable[[str], str]

WRAPPERS: dict[str, tuple[Rename, str]] = {
    "model. missing": (lambda name: name.removeprefix("model."), "'' → 'model.'"),
    "inside a vision model": (
        lambda name: name.replace("model.", "model.language_model.", 1),
        "'model.language_model.' → 'model.'",
    ),
    "inside an older vision model": (lambda name: f"language_model.{name}", "'language_model.' → ''"),
    "torch.compile": (lambda name: f"_orig_mod.{name}", "'_orig_mod.' → ''"),
    "DDP": (lambda name: f"module.{name}", "'module.' → ''"),
    "PEFT": (lambda name: f"base_model.model.{name}", "'base_model.model.' → ''"),
    "DDP around torch.compile": (lambda name: f"module._orig_mod.{name}", "'module._orig_mod.' → ''"),
    "every layer compiled": (
        lambda name: name.replace(".self_attn", "._orig_mod.self_attn"),
        "'model.layers.N._orig_mod.' → 'model.layers.N.'",
    ),
}


def tensors_of(seed: int, rename: Rename = str) -> dict[str, Raw]:
    rng = np.random.default_rng(seed)
    return {rename(name): weights(rng, "BF16", shape) for name, shape in SHAPES.items()}


def wanted(rename: Rename = str) -> dict[str, Raw]:
    t, a, b = (tensors_of(number) for number in range(3))
    return {rename(name): combined(raw, [(a[name], b[name])], [ALPHA]) for name, raw in t.items()}


def models_of(folder: Path, **renames: Rename) -> Path:
    renamed = {role: tensors_of(number, renames.get(role, str)) for number, role in enumerate(ROLES)}
    return write_models(folder, renamed)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_recognised_and_the_target_s_names_are_kept(tmp_path: Path, wrapper: str, role: str) -> None:
    rename, shown = WRAPPERS[wrapper]
    models = models_of(tmp_path, **{role: rename})
    found, said = transferred(models)
    assert_same(found, wanted(rename if role == "target" else str))
    assert "names  " in said
    if role != "target":
        assert f"{role}: {shown}" in said
        row = rows_of(models / "out")["model.layers.10.self_attn.q_proj.weight"]
        assert row.matched == f"{role}: {rename('model.layers.10.self_attn.q_proj.weight')}"
    assert json.loads((models / "out" / "rv_manifest.json").read_bytes())["left_out"] == []


def test_a_vector_keeps_the_donor_s_names_and_is_matched_by_them(tmp_path: Path) -> None:
    models = models_of(tmp_path, donor=WRAPPERS["PEFT"][0], reference=WRAPPERS["DDP"][0])
    assert_same(applied(models), wanted())
    assert "base_model.model.model.norm.weight" in read_checkpoint(models / "vector")


def test_two_tensors_with_one_name_inside_their_wrappers_are_not_guessed_at(tmp_path: Path) -> None:
    models = models_of(tmp_path, donor=WRAPPERS["DDP"][0])
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    tensors["donor"]["base_model.model.model.norm.weight"] = tensors["donor"]["module.model.norm.weight"]
    again = write_models(tmp_path / "again", tensors)
    told = (
        f"{again / 'donor'}: tensor 'model.norm.weight': could be 'module.model.norm.weight' or "
        "'base_model.model.model.norm.weight'"
    )
    assert_refused(again, transfer(again, again / "out"), (told, "--key-mapping"))
    (tmp_path / "rules").write_text(r"^base_model\. -> other." + "\n")
    found, said = transferred(again, "--key-mapping", str(tmp_path / "rules"))
    assert_same(found, wanted())
    assert "left out  1 tensor with no place in the output: base_model.model.model.norm.weight" in said


def test_a_tensor_under_its_own_name_is_taken_whatever_else_there_is(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    tensors["donor"]["language_model.model.norm.weight"] = tensors["target"]["model.norm.weight"]
    again = write_models(tmp_path / "again", tensors)
    found, said = transferred(again)
    assert_same(found, wanted())
    assert "left out  1 tensor with no place in the output: language_model.model.norm.weight" in said


def test_a_vision_model_gets_a_language_model_s_vector_and_keeps_its_eyes(tmp_path: Path) -> None:
    rename = WRAPPERS["inside a vision model"][0]
    models = models_of(tmp_path, target=rename)
    target = read_checkpoint(models / "target")
    eye = {"model.visual.blocks.0.weight": weights(np.random.default_rng(9), "BF16", (40, 40))}
    configs = {"target": {"model_type": "gemma3", "text_config": {"model_type": "llama", "num_hidden_layers": 1}}}
    others = {role: read_checkpoint(models / role) for role in ("donor", "reference")}
    again = write_models(tmp_path / "again", {"target": eye | target, **others}, configs=configs)
    found, said = transferred(again)
    assert_same(found, eye | wanted(rename))
    assert "5 computed, 1 copied (1 not in any vector)" in said


RULES = {
    "rules.txt": r"""
# from GPT-2's names

^transformer_\.h\. -> model.layers.
  \.attn\.  ->  .self_attn.
^drop\. ->
""",
    "rules.json": r"""
{
	"^transformer_\\.h\\.": "model.layers.",
	"\\.attn\\.": ".self_attn.", "^drop\\.": ""}
""",
    "rules.yaml": r"""
'^transformer_\.h\.': model.layers.
'\.attn\.': .self_attn.
'^drop\.':
""",
}


def gpt(name: str) -> str:
    name = name.replace("model.layers.", "transformer_.h.").replace("self_attn", "attn")
    return f"drop.{name}" if name == "lm_head.weight" else name


@pytest.mark.parametrize("file", RULES)
def test_rules_name_what_is_not_recognised(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text(RULES[file])
    models = models_of(tmp_path, donor=gpt)
    args = transfer(models, models / "out")
    assert_refused(models, args, "is missing, but the target and the reference have it")
    found, said = transferred(models, "--key-mapping", str(tmp_path / file))
    assert_same(found, wanted())
    assert "donor: model.layers.N.self_attn.q_proj.weight as transformer_.h.N.attn.q_proj.weight (2 tensors)" in said
    matched = rows_of(models / "out")["model.layers.10.self_attn.q_proj.weight"].matched
    assert matched == "donor: transformer_.h.10.attn.q_proj.weight"
    (tmp_path / file).unlink()
    # The manifest holds the rules: their file is not needed to compute the output again.
    assert "computed again from the inputs" in ok("verify", models / "out", "--against-inputs").stdout


def test_rules_go_on_top_of_wrappers_and_layers(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("\\.attn\\. -> .self_attn.\n")
    models = models_of(tmp_path, donor=lambda name: f"module.{name.replace('self_attn', 'attn')}")
    found, _ = transferred(models, "--key-mapping", str(tmp_path / "rules"))
    assert_same(found, wanted())
    matched = rows_of(models / "out")["model.layers.0.self_attn.q_proj.weight"].matched
    assert matched == "donor: module.model.layers.0.attn.q_proj.weight"


def test_rules_that_give_one_name_twice_are_refused_with_both_tensors(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text(r"layers\.\d+\. -> layers.0." + "\n")
    models = models_of(tmp_path)
    names = "'model.layers.0.self_attn.q_proj.weight', 'model.layers.10.self_attn.q_proj.weight'"
    told = f"is the name that --key-mapping gives to several tensors: {names}"
    done = assert_refused(models, transfer(models, models / "out", "--key-mapping", str(tmp_path / "rules")), told)
    assert f"{models / 'donor'}: tensor 'model.layers.0" in done.stderr
    assert f"{models / 'reference'}: tensor 'model.layers.0" in done.stderr


def test_a_rule_without_effect_is_told(tmp_path: Path) -> None:
    (tmp_path / "rules").write_text("^nothing\\. -> x.\n")
    _, said = transferred(models_of(tmp_path), "--key-mapping", str(tmp_path / "rules"))
    assert "key mapping  no name is changed by '^nothing" in said


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("rules", "a -> b\nmodel\n( -> x\n", (":2: 'model' is no rule", ":3: '(' -> 'x' cannot be applied")),
        ("rules", "(a) -> \\2\n", (":1: '(a)'", "invalid group reference")),
        ("rules", "# nothing\n", (": holds no rule",)),
        ("rules", "a -> b\nc -> d\na -> c\n", (":3: 'a' stands there twice",)),
        ("rules", "a -> b\n\xff".encode("latin-1"), ("is not UTF-8",)),
        ("rules.yaml", "a: b\n- c\n", (":2: cannot be read",)),
        ("rules.json", '{"a":\n "b",\n "c": ["d"]}', (":3: a regular expression and its replacement are texts",)),
        ("rules.json", '["a"]', (":1: is no object",)),
        ("rules.json", "{", ("cannot be read",)),
        ("rules.yaml", "", (": holds no rule",)),
        ("rules.yaml", "[" * 5000, ("cannot be read",)),
    ],
)
def test_a_file_of_rules_that_cannot_be_used_is_refused_by_line(
    tmp_path: Path, file: str, content: str | bytes, told: tuple[str, ...]
) -> None:
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    models = models_of(tmp_path)
    args = transfer(models, models / "out", "--key-mapping", str(path))
    assert_refused(models, args, *(f"{path}{text}" if text.startswith(":") else text for text in told))


def test_a_missing_file_of_rules_is_named(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    args = transfer(models, models / "out", "--key-mapping", str(tmp_path / "none"))
    assert_refused(models, args, f"{tmp_path / 'none'}: cannot be read: No such file")


def test_a_recipe_states_the_rules_and_the_other_options(tmp_path: Path) -> None:
    models = models_of(tmp_path, donor=gpt)
    recipe = models / "recipe.yaml"
    recipe.write_text(
        "target: target\nvectors:\n- {donor: donor, reference: reference, alpha: 0.7}\nmissing: copy\n"
        "vocab_mismatch: overlap\nforce_tokenizer_mismatch: true\nsidecars_from: donor\nkey_mapping:\n"
        "  '^transformer_\\.h\\.': model.layers.\n  '\\.attn\\.': .self_attn.\n  '^drop\\.': ''\n"
    )
    ok("run", recipe, "--out", models / "out", "--runtime", "local")
    assert_same(read_checkpoint(models / "out"), wanted())
    options = json.loads((models / "out" / "rv_manifest.json").read_bytes())["options"]
    assert json.loads(options["key_mapping"])[2] == [r"^drop\.", ""]
    assert (options["missing"], options["sidecars_from"]) == ("copy", "donor")
    assert (options["vocab_mismatch"], options["force_tokenizer_mismatch"]) == ("overlap", "true")
    # What is written beside the output says the same.
    ok("verify", models / "out", "--against-inputs")
    ok("run", models / "out" / "rv_recipe.yaml", "--out", models / "again", "--runtime", "local")
    assert_same(read_checkpoint(models / "again"), wanted())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("key_mapping: {'(': x}", "is not a regular expression"),
        ("key_mapping: {'(a)': '\\2'}", "cannot be applied"),
        ("key_mapping: [a]", "key_mapping"),
        ("missing: perhaps", "missing"),
        ("sidecars_from: nobody", "sidecars_from"),
    ],
)
def test_options_of_a_recipe_that_make_no_sense_are_refused(tmp_path: Path, line: str, told: str) -> None:
    models = models_of(tmp_path)
    recipe = models / "recipe.yaml"
    recipe.write_text(f"target: target\nvectors:\n- {{donor: donor, reference: reference}}\n{line}\n")
    assert_refused(models, ["run", recipe, "--out", models / "out"], (f"{recipe}:", told))
