"""Matching: which tensors are combined, cast, copied or refused, and what the plan says about each."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from reference import described

from rv_distributed.checkpoint.sources import path_of
from rv_distributed.errors import InputError, UsageError
from rv_distributed.plan import Operand, Plan, PlanOptions, Segment, TensorPlan, make_plan
from rv_distributed.recipe import Arithmetic, Recipe, Vector

Shapes = dict[str, tuple[str, tuple[int, ...]]]

MODEL: Shapes = {
    "embed": ("BF16", (8, 4)),
    "norm": ("F32", (4,)),
    "steps": ("I64", (2,)),
    "half": ("F16", (3, 2)),
}


def transfer(
    target: Shapes, donor: Shapes, reference: Shapes, options: PlanOptions | None = None, alpha: float = 0.7
) -> Plan:
    opened = {"t": described("/t", target), "a": described("/a", donor), "b": described("/b", reference)}
    return make_plan(Recipe("transfer", "t", (Vector("a", "b"),), ((alpha,),)), opened, options or PlanOptions())


def extract(donor: Shapes, reference: Shapes, options: PlanOptions | None = None) -> Plan:
    opened = {"a": described("/a", donor), "b": described("/b", reference)}
    return make_plan(Recipe("extract", None, (Vector("a", "b"),), ((1.0,),)), opened, options or PlanOptions())


def rules(plan: Plan) -> dict[str, tuple[str, str, str]]:
    return {tensor.name: (tensor.rule, tensor.dtype, tensor.why) for tensor in plan.tensors}


def tensor_of(plan: Plan, name: str) -> TensorPlan:
    return next(tensor for tensor in plan.tensors if tensor.name == name)


def segment_of(plan: Plan, name: str) -> Segment:
    """The one segment of a tensor that is made alike throughout."""
    tensor = tensor_of(plan, name)
    (segment,) = tensor.segments
    assert segment.stop == tensor.stop - tensor.start
    return segment


def without(tensors: Shapes, *names: str) -> Shapes:
    return {name: entry for name, entry in tensors.items() if name not in names}


def test_floats_are_combined_and_integers_copied_in_the_target_s_order() -> None:
    backwards = dict(reversed(MODEL.items()))
    plan = transfer(MODEL, backwards, backwards)
    assert list(rules(plan).items()) == [
        ("embed", ("combine", "BF16", "")),
        ("norm", ("combine", "F32", "")),
        ("steps", ("copy", "I64", "I64 is not a floating-point dtype")),
        ("half", ("combine", "F16", "")),
    ]
    assert plan.left_out == ()


def test_operands_are_where_each_checkpoint_has_the_tensor() -> None:
    donor: Shapes = {"half": ("F32", (3, 2)), "embed": ("F16", (8, 4))}
    plan = transfer(MODEL, donor, {"embed": ("BF16", (8, 4)), **donor})
    embed = segment_of(plan, "embed")
    assert embed.target == Operand("/t/model.safetensors", 8, "BF16")
    assert [(v.vector, v.plus, v.minus) for v in embed.vectors] == [
        (0, Operand("/a/model.safetensors", 8 + 24, "F16"), Operand("/b/model.safetensors", 8, "F16"))
    ]


@pytest.mark.parametrize(
    ("donor", "reference", "why"),
    [
        (without(MODEL, "norm"), MODEL, "not in the donor"),
        (MODEL, without(MODEL, "norm"), "not in the reference"),
        (without(MODEL, "norm"), without(MODEL, "norm"), "not in any vector"),
    ],
)
def test_a_tensor_missing_from_the_vector_is_copied_and_says_why(donor: Shapes, reference: Shapes, why: str) -> None:
    plan = transfer(MODEL, donor, reference, PlanOptions(missing="copy"))
    assert rules(plan)["norm"] == ("copy", "F32", why)
    assert segment_of(plan, "norm").vectors == ()
    assert plan.left_out == ()


def test_tensors_that_only_the_vector_has_are_left_out_by_name() -> None:
    extra: Shapes = {**MODEL, "z_head": ("F32", (2,)), "head": ("BF16", (2,))}
    plan = transfer(MODEL, extra, {**MODEL, "z_head": ("F32", (2,)), "other": ("F32", (9,))})
    assert plan.left_out == (("head", "only in /a"), ("other", "only in /b"), ("z_head", "only in /a"))
    assert list(rules(plan)) == list(MODEL)


@pytest.mark.parametrize(
    ("options", "combined"),
    [
        (PlanOptions(include="^(embed|norm)$"), ["embed", "norm"]),
        (PlanOptions(exclude="^e"), ["norm", "half"]),
        (PlanOptions(include="m", exclude="norm"), ["embed"]),
    ],
)
def test_include_and_exclude_choose_who_gets_the_vector(options: PlanOptions, combined: list[str]) -> None:
    plan = transfer(MODEL, MODEL, MODEL, options)
    assert [tensor.name for tensor in plan.tensors if tensor.rule == "combine"] == combined
    for name, (rule, _, why) in rules(plan).items():
        if name not in combined:
            assert rule == "copy"
            assert why == "not selected by --include and --exclude" or name == "steps"


def test_a_selection_of_nothing_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="leave no tensor"):
        transfer(MODEL, MODEL, MODEL, PlanOptions(include="no such name"))


@pytest.mark.parametrize("alpha", [0.0, -0.0, 1e-60])
def test_a_vector_with_alpha_zero_is_left_out_of_the_plan(alpha: float) -> None:
    plan = transfer(MODEL, {"other": ("F32", (1,))}, MODEL, alpha=alpha)
    assert rules(plan) == {name: ("copy", dtype, "alpha is 0") for name, (dtype, _) in MODEL.items()}
    assert plan.left_out == ()


def test_one_of_several_vectors_with_alpha_zero_keeps_the_others_numbers() -> None:
    opened = {"t": described("/t", MODEL), **{name: described(f"/{name}", MODEL) for name in "vwx"}}
    recipe = Recipe("apply", "t", (Vector("v"), Vector("w"), Vector("x")), ((0.5, 0.0, 2.0), (1.0, 0.0, 0.0)))
    embed = segment_of(make_plan(recipe, opened, PlanOptions()), "embed")
    assert [(v.vector, path_of(v.plus, 0), v.minus) for v in embed.vectors] == [
        (0, "/v/model.safetensors", None),
        (2, "/x/model.safetensors", None),
    ]


def test_a_tensor_that_one_of_two_vectors_lacks_gets_the_other() -> None:
    opened = {
        "t": described("/t", MODEL),
        "v": described("/v", without(MODEL, "norm")),
        "w": described("/w", without(MODEL, "half")),
    }
    plan = make_plan(Recipe("apply", "t", (Vector("v"), Vector("w")), ((1.0, 1.0),)), opened, PlanOptions())
    assert [v.vector for v in segment_of(plan, "norm").vectors] == [1]
    assert [v.vector for v in segment_of(plan, "half").vectors] == [0]
    assert [v.vector for v in segment_of(plan, "embed").vectors] == [0, 1]


def test_alphas_are_rounded_to_float32() -> None:
    plan = transfer(MODEL, MODEL, MODEL, alpha=0.7)
    assert plan.alphas == ((float(np.float32(0.7)),),)
    assert plan.alphas != ((0.7,),)


def test_alphas_are_as_written_when_the_arithmetic_is_float64() -> None:
    wide = PlanOptions(compute_dtype="float64")
    assert transfer(MODEL, MODEL, MODEL, wide, alpha=0.7).alphas == ((0.7,),)
    # What is 0 in float32 leaves the vector out, in either.
    assert transfer(MODEL, MODEL, MODEL, wide, alpha=1e-60).alphas == ((0.0,),)


def test_the_arithmetic_is_part_of_the_plan_and_of_its_options() -> None:
    plan = transfer(
        MODEL, MODEL, MODEL, PlanOptions(rounding="stochastic", seed=(1 << 64) - 1, compute_dtype="float64")
    )
    assert plan.arithmetic == Arithmetic("float64", "stochastic", (1 << 64) - 1)
    options = dict(plan.options)
    assert (options["rounding"], options["seed"], options["compute_dtype"]) == (
        "stochastic",
        "18446744073709551615",
        "float64",
    )


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39])
def test_an_alpha_beyond_float32_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="not a finite float32"):
        transfer(MODEL, MODEL, MODEL, alpha=alpha)


def test_every_problem_is_reported_at_once_with_its_tensor() -> None:
    donor: Shapes = {**MODEL, "embed": ("BF16", (4, 8)), "norm": ("I64", (4,))}
    reference: Shapes = {**MODEL, "half": ("F8_E4M3", (3, 2)), "embed": ("BF16", (32,))}
    with pytest.raises(InputError) as caught:
        transfer(MODEL, donor, reference)
    assert {(problem.tensor, problem.where) for problem in caught.value.problems} == {
        ("embed", "/a"),
        ("embed", "/b"),
        ("norm", "/a"),
        ("half", "/b"),
    }
    text = str(caught.value)
    for part in ("4 problems", "[4, 8]", "[32]", "[8, 4]", "I64", "F8_E4M3"):
        assert part in text


@pytest.mark.parametrize("dtype", ["C64", "F8_E4M3"])
def test_a_target_dtype_without_arithmetic_is_refused_unless_it_is_excluded(dtype: str) -> None:
    model: Shapes = {**MODEL, "odd": (dtype, (4,))}
    with pytest.raises(InputError) as caught:
        transfer(model, model, model)
    assert {problem.tensor for problem in caught.value.problems} == {"odd"}
    plan = transfer(model, model, model, PlanOptions(exclude="odd"))
    assert rules(plan)["odd"][:2] == ("copy", dtype)


def test_the_problem_of_a_target_s_dtype_names_the_target() -> None:
    with pytest.raises(InputError) as caught:
        transfer(
            {**MODEL, "odd": ("F8_E4M3", (4,))}, {**MODEL, "odd": ("BF16", (4,))}, {**MODEL, "odd": ("BF16", (4,))}
        )
    assert [(problem.where, problem.tensor) for problem in caught.value.problems] == [("/t", "odd")]


def test_more_problems_than_one_can_read_are_counted() -> None:
    model: Shapes = {f"w{number}": ("F32", (2,)) for number in range(50)}
    other: Shapes = dict.fromkeys(model, ("F32", (3,)))
    with pytest.raises(InputError) as caught:
        transfer(model, other, model)
    assert len(caught.value.problems) == 21
    assert "30 more" in str(caught.value)


def test_models_with_nothing_in_common_are_refused() -> None:
    with pytest.raises(InputError, match="no tensor in common with /a"):
        transfer(MODEL, {"x": ("F32", (1,))}, {"x": ("F32", (1,))})


def test_extract_keeps_floats_of_both_and_lists_what_it_drops() -> None:
    donor: Shapes = {**MODEL, "mine": ("F32", (1,))}
    options = PlanOptions(dtype="float32", missing="copy")
    plan = extract(donor, {**without(MODEL, "half"), "yours": ("F32", (1,))}, options)
    assert rules(plan) == {"embed": ("combine", "F32", ""), "norm": ("combine", "F32", "")}
    assert sorted(plan.left_out) == [
        ("half", "not in the reference"),
        ("mine", "not in the reference"),
        ("steps", "I64 is not a floating-point dtype"),
        ("yours", "only in /b"),
    ]
    assert all(segment_of(plan, tensor.name).target is None for tensor in plan.tensors)


@pytest.mark.parametrize(
    ("dtype", "name"), [("auto", None), ("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")]
)
@pytest.mark.parametrize("operation", ["extract", "transfer"])
def test_the_dtype_applies_to_floats_only(
    operation: Literal["extract", "transfer"], dtype: str, name: str | None
) -> None:
    options = PlanOptions(dtype=dtype)
    plan = extract(MODEL, MODEL, options) if operation == "extract" else transfer(MODEL, MODEL, MODEL, options)
    for tensor in plan.tensors:
        own = MODEL[tensor.name][0]
        wanted = name or ("F32" if operation == "extract" else own)
        assert tensor.dtype == (own if own == "I64" else wanted)


def test_tensors_outside_the_vector_are_cast_when_the_dtype_differs() -> None:
    plan = transfer(MODEL, without(MODEL, "norm", "embed"), MODEL, PlanOptions(dtype="float32", missing="copy"))
    assert rules(plan)["embed"] == ("cast", "F32", "not in the donor")
    assert rules(plan)["norm"] == ("copy", "F32", "not in the donor")
    assert tensor_of(plan, "embed").stop - tensor_of(plan, "embed").start == 8 * 4 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"max_shard_bytes": 0}, "positive"),
        ({"include": "("}, "regular expression"),
        ({"exclude": "["}, "regular expression"),
        ({"piece_bytes": 0}, "1 MiB"),
        ({"piece_bytes": (1 << 20) + 1}, "1 MiB"),
        ({"piece_bytes": 3 << 20}, "a power of two"),
        ({"rounding": "up"}, "nearest, stochastic"),
        ({"compute_dtype": "bfloat16"}, "float32, float64"),
        ({"seed": 1}, "--rounding stochastic"),
        ({"rounding": "stochastic", "seed": -1}, "between 0 and"),
        ({"rounding": "stochastic", "seed": 1 << 64}, "between 0 and"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PlanOptions(**options)  # type: ignore[arg-type]
