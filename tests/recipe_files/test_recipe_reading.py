"""From recipe files to recipes and back, and what is wrong with files, by line and field."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import rv_distributed as rv
from rv_distributed.errors import InputError, UsageError
from rv_distributed.plan import PlanOptions
from rv_distributed.recipe import ByTensor, Choice, Recipe, Vector
from rv_distributed.recipe_files.fields import RecipeFields, recipe_schema
from rv_distributed.recipe_files.loaded import resolve
from rv_distributed.recipe_files.reading import load_recipe
from rv_distributed.recipe_files.writing import recipe_text

FULL = r"""
target: models/t
vectors:
  - vector: /vectors/math
  - donor: ../grpo
    reference: hf://org/sft
    alpha: [0.25, 1]
  - vector: v
    alpha:
      - match: '\.mlp\.'
        alpha: 0.5
      - match: [self_attn, q_proj]
        alpha: [1, 0]
      - alpha: -0.125
sweep:
  alpha: [0.5, 1]
  include: {late: 'layers\.[12]', all: ''}
dtype: bfloat16
max_shard_size: 2GB
exclude: lm_head
rounding: stochastic
seed: 7
compute_dtype: float64
stats: basic
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def problems_of(tmp_path: Path, text: str) -> list[tuple[int, str]]:
    """Line and text of each problem."""
    with pytest.raises(InputError) as raised:
        load_recipe(write(tmp_path, text))
    assert all(problem.remedy for problem in raised.value.problems)
    return [(int(problem.where.rpartition(":")[2]), problem.what) for problem in raised.value.problems]


def test_every_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "models/t").mkdir(parents=True)
    loaded = load_recipe(write(tmp_path, FULL))
    recipe, options = loaded.recipe, loaded.plan_options
    assert (recipe.operation, recipe.target) == ("apply", str(tmp_path / "models/t"))
    assert recipe.vectors == (
        Vector("/vectors/math"),
        Vector(str(tmp_path.parent / "grpo"), "hf://org/sft"),
        Vector(str(tmp_path / "v")),
    )
    assert loaded.labels == tuple(
        {"alpha": alpha, "include": include} for alpha in ("0.5", "1") for include in ("late", "all")
    )
    late = r"layers\.[12]"
    assert recipe.alphas[0] == (
        ByTensor((Choice((0.5,), (late,)),)),
        ByTensor((Choice((0.25, 1.0), (late,)),)),
        ByTensor(
            (
                Choice((0.5,), (late, r"\.mlp\.")),
                Choice((1.0, 0.0), (late, "self_attn", "q_proj")),
                Choice((-0.125,), (late,)),
            )
        ),
    )
    assert options == PlanOptions(
        dtype="bfloat16",
        max_shard_bytes=2_000_000_000,
        exclude="lm_head",
        rounding="stochastic",
        seed=7,
        compute_dtype="float64",
        stats="basic",
    )
    assert loaded.outs("o-{alpha}-{include}") == ["o-0.5-late", "o-0.5-all", "o-1-late", "o-1-all"]
    with pytest.raises(UsageError, match=r"out-\{alpha\}-\{include\}"):
        loaded.outs("o-{alpha}")
    with pytest.raises(UsageError, match=r"\{alfa\} stands for nothing here, only \{alpha\} and \{include\}"):
        loaded.outs("o-{alfa}-{include}")
    single = load_recipe(write(tmp_path, "target: t\nvectors: [{vector: a}]"))
    assert single.outs("o") == ["o"]
    with pytest.raises(UsageError, match=r"--out: \{alpha\} stands for nothing here"):
        single.outs("o-{alpha}-{include}")


@pytest.mark.parametrize(
    ("text", "operation"),
    [
        ("vectors: [{donor: a, reference: b}]", "extract"),
        ("target: t\nvectors: [{donor: a, reference: b}]", "transfer"),
        ("target: t\nvectors: [{donor: a, reference: b}, {vector: c}]", "apply"),
        ("target: t\noperation: task_arithmetic\nvectors: [{donor: a, reference: t}]\nscale: 0.5", "task_arithmetic"),
        ("vectors: [{model: a}, {model: b}]\nnormalize: true\nbase: b", "linear"),
    ],
)
def test_the_operation_follows_from_the_fields(tmp_path: Path, text: str, operation: str) -> None:
    assert load_recipe(write(tmp_path, text)).recipe.operation == operation


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("target: 1\nvectors:\n- vector: a", [(1, "target: is 1, but it should be a valid string")]),
        ("vectors: []", [(1, "vectors: List should have at least 1 item")]),
        ("target: t", [(1, "vectors: is missing")]),
        ("target: t\nvectors:\n- vector: a\n  weight: 2", [(4, "vectors.0.weight: is not supported")]),
        ("target: t\nvectors:\n- donor: a", [(3, "vectors.0: give a vector, or a donor and a reference, or a model")]),
        ("target: t\nvectors:\n- vector: a\n  alpha: [1, x]", [(4, "vectors.0.alpha.1: is 'x', but it should")]),
        ("target: t\nvectors:\n- vector: a\n  alpha: yes", [(4, "vectors.0.alpha: is true or false")]),
        (
            "target: t\nvectors:\n- vector: a\n  alpha: .inf",
            [(4, "vectors.0.alpha: is inf, but it should be a finite")],
        ),
        ("target: t\nvectors:\n- vector: a\n  alpha: 1e39", [(1, "alpha 1e+39 is not a finite float32")]),
        (
            "target: t\nvectors:\n- vector: a\n  alpha:\n  - match: '('\n    alpha: 1",
            [(5, "vectors.0.alpha.0.match: '(' is not a regular expression")],
        ),
        (
            "target: t\nvectors: [{vector: a}]\ninclude: '['\ndtype: int8",
            [(4, "dtype: is 'int8'"), (3, "include: '['")],
        ),
        ("target: t\nvectors: [{vector: a}]\nmax_shard_size: big", [(3, "max_shard_size: a size: 'big'")]),
        ("target: t\nvectors: [{model: a}]", [(2, "vectors.0: is a model")]),
        ("vectors: [{model: a}, {vector: b}]", [(1, "vectors.1: is a vector")]),
        ("vectors:\n- vector: b", [(2, "vectors.0: extract takes one donor")]),
        ("vectors:\n- {donor: a, reference: b, alpha: 2}", [(2, "vectors.0.alpha: goes with a target only")]),
        ("target: t\nvectors: [{vector: a}]\nbase: b", [(3, "base: goes with a sum of models only")]),
        ("target: t\nvectors: [{vector: a}]\nscale: 2", [(1, "normalize and scale go with")]),
        ("operation: linear\ntarget: t\nvectors: [{model: a}]", [(1, "linear has no target")]),
        ("target: t\nvectors: [{vector: a, alpha: 1}]\nsweep: {alpha: [1]}", [(3, "sweep.alpha: changes nothing")]),
        ("vectors: [{donor: a, reference: b}]\nsweep:\n  alpha: [1]", [(3, "sweep: goes with a target only")]),
        (
            "target: t\nvectors: [{vector: a}]\nsweep:\n  alpha: [1, .5, 0.50]",
            [(4, "sweep.alpha: holds 0.5 more than")],
        ),
        ("target: t\nvectors: [{vector: a}]\nsweep:\n  include: {a/b: x}", [(4, "sweep.include.a/b: 'a/b' cannot be")]),
        ("target: t\nvectors: [{vector: a}]\nseed: 3", [(1, "--seed 3 changes nothing")]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told_with_line_and_field(tmp_path: Path, text: str, wanted: list[tuple[int, str]]) -> None:
    found = problems_of(tmp_path, text)
    assert len(found) == len(wanted), found
    for (line, what), (wanted_line, begin) in zip(sorted(found), sorted(wanted), strict=True):
        assert what.startswith(begin), found
        assert line == wanted_line, found


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    assert len(problems_of(tmp_path, "target: 1\nvectors: [{vector: 2, x: 3}]\ny: 4\nseed: -1\n")) == 5


def test_names_with_an_adapter_are_resolved_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    recipe = load_recipe(
        write(tmp_path, "target: base+lora\nvectors: [{donor: a+b, reference: hf://o/m+/lora}]")
    ).recipe
    assert recipe.target == f"{tmp_path}/base+{tmp_path}/lora"
    assert recipe.vectors == (Vector(f"{tmp_path}/a+b", "hf://o/m+/lora"),)
    for name, wanted in (("a+b+lora", "{}/a+b+{}/lora"), ("base+hf://o/lora", "{}/base+hf://o/lora")):
        assert resolve(name, str(tmp_path)) == wanted.format(tmp_path, tmp_path)


def test_models_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "here/a").mkdir(parents=True)
    text = "target: here/a\nvectors: [{donor: org/a+org/b, reference: org/a@pr-1}, {vector: ./org/a}]"
    recipe = load_recipe(write(tmp_path, text)).recipe
    assert recipe.target == f"{tmp_path}/here/a"
    assert recipe.vectors == (Vector("hf://org/a+hf://org/b", "hf://org/a@pr-1"), Vector(f"{tmp_path}/org/a"))


def test_names_in_a_recipe_that_lies_in_a_store() -> None:
    folder = "s3://lab/recipes?region=x"
    assert resolve("models/a", folder) == "s3://lab/recipes/models/a?region=x"
    assert [resolve(name, folder) for name in ("/models/a", "gs://lab/a", "a+/b")] == [
        "/models/a",
        "gs://lab/a",
        "s3://lab/recipes/a?region=x+/b",
    ]


RECIPES = {
    "extract": Recipe("extract", None, (Vector("a", "b"),), ((1.0,),)),
    "transfer": Recipe("transfer", "t", (Vector("a", "b"),), ((0.7,), (1e-7,))),
    "apply": Recipe("apply", "t", (Vector("a"), Vector("b", "c")), ((0.1, ByTensor((Choice((0.0, 1.0)),))),)),
    "rules": Recipe("apply", "t", (Vector("a"),), ((ByTensor((Choice((0.5,), ("x$", "${HOME}")),)),),)),
    "task_arithmetic": Recipe(
        "task_arithmetic", "t", (Vector("a", "t"),), ((0.5,),), normalize=True, scale=ByTensor((Choice((1.0, 2.0)),))
    ),
    "linear": Recipe("linear", None, (Vector("a"), Vector("b")), ((1.0, -1.0),), normalize=True, base="b"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_was_written_is_read_as_what_it_was(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    names = {uri: f"/models/${{HOME}} $${{x {uri} é" for uri in "abct"}
    options = PlanOptions(include=r"\.mlp\.", seed=3, rounding="stochastic", max_shard_bytes=12345)
    for output in range(len(recipe.alphas)):
        loaded = load_recipe(write(tmp_path, recipe_text(recipe, output, options, names)))
        assert loaded.plan_options == options
        found = loaded.recipe
        assert found.vectors == tuple(
            Vector(names[vector.plus], vector.minus and names[vector.minus]) for vector in recipe.vectors
        )
        assert found.alphas == (recipe.alphas[output],)
        assert (found.operation, found.normalize, found.scale) == (recipe.operation, recipe.normalize, recipe.scale)
        assert (found.target, found.base) == (
            recipe.target and names[recipe.target],
            recipe.base and names[recipe.base],
        )


def test_every_option_of_a_plan_is_a_field_and_is_written() -> None:
    """An option that a recipe leaves out would be another one when the recipe is run again."""
    names = {"max_shard_bytes": "max_shard_size"}
    options = {names.get(field.name, field.name) for field in fields(PlanOptions)} - {"piece_bytes"}
    assert options <= RecipeFields.model_fields.keys()
    text = recipe_text(RECIPES["extract"], 0, PlanOptions(), {"a": "/a", "b": "/b"})
    assert all(f"\n{option}:" in text for option in options)


def test_the_published_schema_is_that_of_the_fields() -> None:
    path = Path(rv.__file__).parent / "schemas" / "recipe.schema.json"
    assert json.loads(path.read_text()) == recipe_schema(), (
        "run: rv recipe schema > rv_distributed/schemas/recipe.schema.json"
    )


def test_writing_a_recipe_imports_no_pydantic() -> None:
    """Every run writes one, and would wait a tenth of a second for what reads them."""
    script = (
        "import sys, rv_distributed.preparing, rv_distributed.recipe_files.writing; print('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n"
