"""Alphas by tensor: what each output computes with, and what is the same as a run of its own."""

from __future__ import annotations

import pytest
from reference import described

from rv_distributed.errors import InputError, UsageError
from rv_distributed.identity import identity_of
from rv_distributed.plan import Operand, Plan, PlanOptions, Segment, TensorPlan, make_plan, task_of
from rv_distributed.recipe import Alpha, ByTensor, Choice, Recipe, Vector, Weights

SHAPES = {
    "model.embed_tokens.weight": ("BF16", (4, 4)),
    **{f"model.layers.{n}.{name}.weight": ("BF16", (4, 4)) for n in range(5) for name in ("mlp.up", "self_attn.q")},
    "visual.blocks.0.w": ("BF16", (4,)),
    "visual.blocks.1.w": ("BF16", (4,)),
    "model.norm.weight": ("BF16", (4,)),
}
OPENED = {name: described(f"/{name}", SHAPES) for name in "tabc"}


def plan(*rows: tuple[Alpha, ...], operation: str = "apply", **more: object) -> Plan:
    vectors = tuple(Vector(name) for name in "abc"[: len(rows[0])])
    target = "t" if operation == "apply" else None
    return make_plan(Recipe(operation, target, vectors, rows, **more), OPENED, PlanOptions())  # type: ignore[arg-type]


def alphas(of: Plan, output: int = 0) -> dict[str, tuple[float, ...]]:
    return {tensor.name: segment_of(tensor).weights[output].alphas for tensor in of.tensors if tensor.rule == "combine"}


def segment_of(tensor: TensorPlan) -> Segment:
    (segment,) = tensor.segments
    return segment


def test_a_gradient_goes_from_the_first_layer_to_the_last_of_each_stack() -> None:
    found = alphas(plan((ByTensor((Choice((0.0, 1.0, 0.5)),)),)))
    layers = [found.get(f"model.layers.{n}.mlp.up.weight") for n in range(5)]
    # At 0 it is copied.
    assert layers == [None, (0.5,), (1.0,), (0.75,), (0.5,)]
    assert (found.get("visual.blocks.0.w"), found["visual.blocks.1.w"]) == (None, (0.5,))
    assert "model.embed_tokens.weight" not in found
    assert "model.norm.weight" not in found


def test_a_single_layer_gets_the_last_number() -> None:
    single = {"one": described("/one", {"layers.0.w": ("F32", (2,))})}
    recipe = Recipe("apply", "one", (Vector("one"),), ((ByTensor((Choice((0.25, 0.75)),)),),))
    (tensor,) = make_plan(recipe, single, PlanOptions()).tensors
    assert segment_of(tensor).weights == (Weights((0.75,)),)


def test_the_first_choice_that_fits_decides_and_0_is_for_the_rest() -> None:
    choices = ByTensor((Choice((0.5,), (r"\.mlp\.", "layers.1")), Choice((0.25,), (r"\.mlp\.",))))
    made = plan((choices,))
    found = alphas(made)
    assert found.pop("model.layers.1.mlp.up.weight") == (0.5,)
    assert found == {f"model.layers.{n}.mlp.up.weight": (0.25,) for n in (0, 2, 3, 4)}
    assert {tensor.why for tensor in made.tensors if tensor.rule == "copy"} == {"alpha is 0"}
    assert made.alphas == ((None,),)


def test_tensors_with_the_same_numbers_share_them() -> None:
    made = plan((0.5, 1.0))
    assert len({id(segment_of(tensor).weights) for tensor in made.tensors}) == 1
    task = task_of(made, made.pieces[0])
    assert {id(span.weights) for span in task.spans} == {id(segment_of(made.tensors[0]).weights)}


def test_an_output_of_a_sweep_has_the_identity_of_a_run_of_its_own() -> None:
    """Also where its alpha is 0 for some tensors, or for all, that the others' is not."""
    rows: list[tuple[Alpha, ...]] = [(0.5,), (0.0,), (ByTensor((Choice((1.0,), ("mlp",)),)),)]
    together = plan(*rows)
    for number, row in enumerate(rows):
        if number != 1:
            assert identity_of(together, number) == identity_of(plan(row), 0)
    assert {tensor.rule_in(1) for tensor in together.tensors} == {("copy", "alpha is 0")}
    assert {tensor.rule for tensor in together.tensors} == {"combine"}
    assert identity_of(together, 0) != identity_of(together, 2)


def test_sums_of_alphas_divide_where_that_is_asked_for() -> None:
    made = plan((0.1, 0.2, 0.7), operation="linear", normalize=True)
    (weights,) = {segment_of(tensor).weights[0] for tensor in made.tensors}
    assert weights.divisor == pytest.approx(1.0, abs=1e-7)
    with pytest.raises(UsageError, match=r"add up to 0, so they cannot be normalized"):
        plan((1.0, -1.0), operation="linear", normalize=True)


def test_what_is_no_number_to_sum_up_is_the_bases_own() -> None:
    shapes = {"w": ("F32", (2,)), "ids": ("I64", (2,))}
    opened = {name: described(f"/{name}", shapes) for name in "ab"}
    recipe = Recipe("linear", None, (Vector("a"), Vector("b")), ((1.0, 1.0),), normalize=True, base="b")
    tensors = {tensor.name: tensor for tensor in make_plan(recipe, opened, PlanOptions()).tensors}
    assert tensors["w"].rule == "combine"
    assert segment_of(tensors["w"])[1::2] == (None, (Weights((1.0, 1.0), 2.0),))
    ids = tensors["ids"]
    assert (ids.rule, ids.why) == ("copy", "I64 is not a floating-point dtype")
    assert segment_of(ids).target == Operand("/b/model.safetensors", 8 + 8, "I64")


def test_models_of_a_sum_must_have_the_same_tensors() -> None:
    opened = OPENED | {"b": described("/b", {name: SHAPES[name] for name in list(SHAPES)[1:]})}
    recipe = Recipe("linear", None, (Vector("a"), Vector("b")), ((1.0, 1.0),))
    with pytest.raises(InputError, match=r"/b: tensor 'model.embed_tokens.weight': is not there, but in /a"):
        make_plan(recipe, opened, PlanOptions())


def test_alphas_that_are_0_everywhere_are_refused() -> None:
    with pytest.raises(UsageError, match="0 for every tensor"):
        plan((ByTensor((Choice((1.0,), ("nothing",)),)),))
