"""mergekit's files: what they mean, what is refused, and the bytes of whole runs.

Expected values are those of `mergekit_reference`; the slow test holds them, and ours, against mergekit itself.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mergekit_reference import as_raw, linear, task_arithmetic
from reference import Raw, assert_same, read_checkpoint, weights, write_checkpoint

import rv_distributed as rv
from rv_distributed.errors import InputError
from rv_distributed.recipe import ByTensor, Choice
from rv_distributed.recipe_files.reading import load_recipe

LAYERS = 3
SHAPES: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, 32)}
for _layer in range(LAYERS):
    _prefix = f"model.layers.{_layer}."
    SHAPES |= {
        f"{_prefix}input_layernorm.weight": (32,),
        f"{_prefix}mlp.down_proj.weight": (32, 48),
        f"{_prefix}mlp.gate_proj.weight": (48, 32),
        f"{_prefix}mlp.up_proj.weight": (48, 32),
        f"{_prefix}post_attention_layernorm.weight": (32,),
        f"{_prefix}self_attn.k_proj.weight": (16, 32),
        f"{_prefix}self_attn.o_proj.weight": (32, 32),
        f"{_prefix}self_attn.q_proj.weight": (32, 32),
        f"{_prefix}self_attn.v_proj.weight": (16, 32),
    }
SHAPES |= {"model.norm.weight": (32,), "lm_head.weight": (64, 32)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
NAMES = ("base", "sft", "grpo", "other")
HOW = rv.RunOptions(runtime="local", workers=2)
Tensors = Mapping[str, Raw]


def make_models(folder: Path, dtype: str) -> dict[str, Tensors]:
    """The reference is close to the donor, as in life: what is left of them is small."""
    found: dict[str, Tensors] = {}
    for number, name in enumerate(NAMES):
        rng = np.random.default_rng(number)
        found[name] = {tensor: weights(rng, dtype, shape) for tensor, shape in SHAPES.items()}
        config = json.dumps(CONFIG | {"torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype]})
        write_checkpoint(folder / name, found[name], sidecars={"config.json": config.encode()})
    return found


def model(name: str, **parameters: object) -> dict[str, Any]:
    return {"model": name, **({"parameters": parameters} if parameters else {})}


def depth(name: str) -> float:
    return int(name.split(".")[2]) / (LAYERS - 1) if ".layers." in name else 0.0


def mlp_rises(name: str) -> float:
    """The weight of ``MLP_RISES``."""
    place = depth(name) * 2
    values = [0.1, 0.9, 0.3, 0.3]
    low, part = int(place), place - int(place)
    return (1 - part) * values[low] + part * values[low + 1] if "mlp" in name else 0.4


MLP_RISES = [{"filter": "mlp", "value": [0.1, 0.9, 0.3]}, {"value": "4e-1"}]
Row = Sequence[tuple[str, float]]


class Case:
    """A mergekit file, and the weights that it gives a tensor."""

    def __init__(self, file: dict[str, Any], rows: Any, dtypes: Sequence[str] = ("F32", "BF16")) -> None:
        self.file, self.rows, self.dtypes = file, rows, dtypes

    def wanted(self, models: Mapping[str, Tensors], name: str, dtype: str) -> Raw:
        parameters = self.file.get("parameters", {})
        row: Row = self.rows(name)
        tensors, alphas = [models[of][name] for of, _ in row], [alpha for _, alpha in row]
        if self.file["merge_method"] == "linear":
            values = linear(tensors, alphas, normalize=parameters.get("normalize", True))
        else:
            scale = parameters.get("lambda", 1.0)
            scale = 2.0 - depth(name) if isinstance(scale, list) else scale
            normalize = parameters.get("normalize", False)
            values = task_arithmetic(models["base"][name], tensors, alphas, normalize=normalize, scale=scale)
        return as_raw(values, tensors[0], dtype)


CASES = {
    "a reasoning vector": Case(
        {
            "merge_method": "linear",
            "models": [model("base", weight=1), model("grpo", weight=0.7), model("sft", weight=-0.7)],
            "parameters": {"normalize": False},
        },
        lambda _: [("base", 1), ("grpo", 0.7), ("sft", -0.7)],
    ),
    "normalized, by filter and layer": Case(
        {
            "merge_method": "linear",
            "models": [model("base", weight=0.3), model("grpo", weight=MLP_RISES), model("sft", weight=[0.2, 0.6])],
            "base_model": "grpo",
            "tokenizer_source": None,
        },
        lambda name: [("base", 0.3), ("grpo", mlp_rises(name)), ("sft", 0.2 + 0.4 * depth(name))],
    ),
    "one weight for all": Case(
        {"merge_method": "linear", "models": [model("sft"), model("grpo")], "parameters": {"weight": 0.25}},
        lambda _: [("sft", 0.25), ("grpo", 0.25)],
    ),
    "a base that is not listed": Case(
        {
            "merge_method": "linear",
            "models": [model("sft", weight=0.5)],
            "base_model": "base",
            "parameters": {"weight": 0.125, "normalize": False},
        },
        lambda _: [("sft", 0.5), ("base", 0.125)],
    ),
    "task arithmetic": Case(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [
                model("base"),
                model("grpo", weight=0.3),
                model("sft", weight=MLP_RISES),
                model("other", weight=-0.2),
            ],
            "parameters": {"normalize": True, "lambda": 0.8, "int8_mask": True},
        },
        lambda name: [("grpo", 0.3), ("sft", mlp_rises(name)), ("other", -0.2)],
        ("F32",),
    ),
    "task arithmetic, scaled by layer": Case(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [model("grpo", weight=0.7)],
            "parameters": {"lambda": [2.0, 1.0]},
        },
        lambda _: [("grpo", 0.7)],
        ("F32",),
    ),
}
RUNS = [(name, dtype) for name, case in CASES.items() for dtype in case.dtypes]


def write_file(folder: Path, file: Mapping[str, Any], dtype: str) -> Path:
    path = folder / "mergekit.yaml"
    document = {key: value for key, value in file.items() if value is not None}
    path.write_text(yaml.safe_dump(document | {"dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype]}))
    return path


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_a_file_of_mergekit_makes_its_bits(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, case = make_models(tmp_path, dtype), CASES[name]
    monkeypatch.chdir(tmp_path)
    (manifest,) = rv.run(write_file(tmp_path, case.file, dtype), str(tmp_path / "out"), run_options=HOW)
    assert manifest.operation == case.file["merge_method"]
    assert_same(read_checkpoint(tmp_path / "out"), {tensor: case.wanted(models, tensor, dtype) for tensor in SHAPES})
    rv.verify(str(tmp_path / "out"))
    rv.verify_against_inputs(str(tmp_path / "out"))
    rv.run(tmp_path / "out" / "rv_recipe.yaml", str(tmp_path / "again"), run_options=HOW)
    for file in ("model.safetensors", "rv_recipe.yaml", "rv_tensors.parquet", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(
    "RV_BENCH_MERGEKIT" not in os.environ, reason="RV_BENCH_MERGEKIT names no environment with mergekit"
)
@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_mergekit_itself_makes_these_bits(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_models(tmp_path, dtype)
    monkeypatch.chdir(tmp_path)
    path = write_file(tmp_path, CASES[name].file, dtype)
    rv.run(path, str(tmp_path / "out"), run_options=HOW)
    program = Path(os.environ["RV_BENCH_MERGEKIT"]) / "bin" / "mergekit-yaml"
    flags = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    subprocess.run([program, path, "theirs", *flags], check=True, timeout=240, env=os.environ | offline)
    ours, theirs = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "theirs")
    assert_same(ours, {tensor: theirs[tensor] for tensor in ours})
    assert theirs.keys() == ours.keys()


def refused(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "mergekit.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        load_recipe(path)
    return [f"{problem.where.rpartition(':')[2]}: {problem.what}" for problem in raised.value.problems]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("merge_method: ties\nmodels: [{model: a}]", "1: merge_method: is 'ties', but it should be 'linear' or"),
        ("merge_method: linear\nslices: []\nmodels: [{model: a, parameters: {weight: 1}}]", "2: slices: is not supp"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {density: 1}}]", "2: models.0.parameters.density: is"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: yes}}]",
            "2: models.0.parameters.weight: is true",
        ),
        ("merge_method: linear\ntokenizer: {source: a}\nmodels: [{model: a}]", "2: tokenizer: is not supported"),
        ("merge_method: linear\ntokenizer_source: union\nmodels: [{model: a}]", "2: tokenizer_source: is 'union'"),
        ("merge_method: linear\nchat_template: auto\nmodels: [{model: a}]", "2: chat_template: is not supported"),
        ("merge_method: linear\ndtype: float64\nmodels: [{model: a}]", "2: dtype: is 'float64', but it should be"),
        ("merge_method: linear\nmodels: [{model: a}]", "2: models.0.parameters.weight: has no weight for any tensor"),
        (
            "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: {filter: mlp, value: 1}",
            "no filter fits",
        ),
        ("merge_method: task_arithmetic\nmodels: [{model: a, parameters: {weight: 1}}]", "1: base_model: is missing"),
        ("merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: a}]", "3: models: are none but the base_mod"),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {lambda: 2}",
            "3: parameters.lambda: goes with task_arithmetic",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ntokenizer_source: base",
            "3: tokenizer_source: needs a base_model",
        ),
        (
            "merge_method: linear\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]",
            "2: base_model.parameters.weight: has no weight for any tensor",
        ),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_not_supported_is_named(tmp_path: Path, text: str, told: str) -> None:
    assert any(told in line for line in refused(tmp_path, text)), refused(tmp_path, text)


def test_all_that_is_not_supported_is_named_at_once(tmp_path: Path) -> None:
    text = (
        "merge_method: dare_ties\nslices: []\nmodels: [{model: a, parameters: {density: 1, weight: x}}]\ndtype: int8\n"
    )
    assert len(refused(tmp_path, text)) == 5


def test_models_on_the_hub_and_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["org/local", "org/remote", "org/remote@abc", "org/remote@a/b"]
    names += ["org/local+org/lora", "./org/none", "/abs/x"]
    models = [model(name, weight=1) for name in names]
    recipe = load_recipe(write_file(tmp_path, {"merge_method": "linear", "models": models}, "F32")).recipe
    assert [vector.plus for vector in recipe.vectors] == [
        str(tmp_path / "org/local"),
        "hf://org/remote",
        "hf://org/remote@abc",
        "hf://org/remote@a%2Fb",
        f"{tmp_path / 'org/local'}+hf://org/lora",
        str(tmp_path / "org/none"),
        "/abs/x",
    ]


def test_a_models_own_weight_comes_before_the_one_for_all(tmp_path: Path) -> None:
    file = {
        "merge_method": "linear",
        "models": [model("a", weight={"filter": "a.b", "value": 2}), model("b", weight=[{"filter": "*", "value": 3}])],
        "parameters": {"weight": [1, 0]},
    }
    recipe = load_recipe(write_file(tmp_path, file, "F32")).recipe
    assert recipe.alphas == ((ByTensor((Choice((2.0,), (r"a\.b",)), Choice((1.0, 0.0)))), 3.0),)
