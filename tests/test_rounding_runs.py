"""Runs that round stochastically or compute in float64: the bytes, whoever makes them, and the alpha they realise."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from reference import (
    USER_NAMES,
    Raw,
    accumulated,
    assert_same,
    difference,
    narrow,
    read_checkpoint,
    weights,
    widen,
    write_checkpoint,
)
from rounding_reference import nearest, neighbours, stochastic, wide_accumulated

import rv_distributed as rv
from rv_distributed.checkpoint.manifest import manifest_from

MIB = 1 << 20
MILLION = 1_000_000
SEED = (1 << 63) + 5
PLAN = rv.PlanOptions(piece_bytes=MIB, max_shard_bytes=3_000_000)
HOW = rv.RunOptions(runtime="local", workers=2)
#: The three bytes in front put every tensor behind them at an odd place, in the inputs and in the outputs.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "mask": ("BOOL", (3,)),
    "embed": ("BF16", (1200, 601)),
    "norm": ("F32", (77,)),
    "half": ("F16", (999, 1001)),
    "out": ("F32", (400_001,)),
    "own": ("BF16", (1001,)),
    "wide": ("F32", (333, 100)),
}
COMPUTED = ("embed", "norm", "half", "out")


class Family(NamedTuple):
    """Target, donor and reference; the first holds two tensors that the others do not."""

    folders: tuple[str, str, str]
    t: dict[str, Raw]
    a: dict[str, Raw]
    b: dict[str, Raw]

    def wanted(self, options: rv.PlanOptions, alpha: float) -> dict[str, Raw]:
        found = {}
        for name, raw in self.t.items():
            dtype = raw.dtype
            if options.dtype != "auto" and dtype in USER_NAMES:
                dtype = next(key for key, user in USER_NAMES.items() if user == options.dtype)
            if name not in COMPUTED and dtype == raw.dtype:
                found[name] = raw
                continue
            pairs: list[tuple[Raw, Raw | None]] = [(self.a[name], self.b[name])] if name in COMPUTED else []
            add = wide_accumulated if options.compute_dtype == "float64" else accumulated
            values = add(raw, pairs, [alpha] * len(pairs))
            if options.rounding == "stochastic":
                data = stochastic(values, dtype, seed=options.seed, name=name)
            else:
                data = nearest(values, dtype)
            found[name] = Raw(dtype, raw.shape, data)
        return found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    rng, root = np.random.default_rng(61), tmp_path_factory.mktemp("family")
    t = {name: weights(rng, dtype, shape) for name, (dtype, shape) in SHAPES.items()}
    a, b = ({name: weights(rng, dtype, SHAPES[name][1]) for name in COMPUTED} for dtype in ("BF16", "F16"))
    made = zip(("target", "donor", "reference"), (t, a, b), strict=True)
    target, donor, reference = (write_checkpoint(root / role, tensors, pad=1) for role, tensors in made)
    return Family((target, donor, reference), t, a, b)


def transfer(family: Family, out: Path, plan: rv.PlanOptions, alpha: float = 0.7, **how: Any) -> rv.Manifest:
    options = replace(HOW, **how)
    return rv.transfer(*family.folders, str(out), alpha=alpha, plan_options=plan, run_options=options)


STOCHASTIC = replace(PLAN, rounding="stochastic", seed=SEED)
WIDE = replace(PLAN, compute_dtype="float64")
BOTH = replace(STOCHASTIC, compute_dtype="float64")
CHOICES = pytest.mark.parametrize("plan", [STOCHASTIC, WIDE, BOTH], ids=["stochastic", "float64", "both"])


@CHOICES
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_outputs_have_the_reference_bits_and_their_inputs_give_them_again(
    family: Family, tmp_path: Path, plan: rv.PlanOptions, dtype: str
) -> None:
    plan, alpha = replace(plan, dtype=dtype), 0.1  # whose float32 is another number
    manifest = transfer(family, tmp_path / "out", plan, alpha)
    assert manifest.timings.pieces > 3
    used = alpha if plan.compute_dtype == "float64" else float(np.float32(alpha))
    assert manifest.alphas == (used,)
    assert_same(read_checkpoint(tmp_path / "out"), family.wanted(plan, used))
    recorded = {name: str(getattr(plan, name)) for name in ("rounding", "seed", "compute_dtype")}
    assert {name: manifest.options[name] for name in recorded} == recorded
    assert manifest.formula == "O = T + 0.1·(A − B)"
    again = rv.verify_against_inputs(str(tmp_path / "out"))
    assert again.pieces == again.pieces_total


@CHOICES
def test_neither_workers_nor_chunks_nor_pieces_nor_shards_change_a_byte(
    family: Family, tmp_path: Path, plan: rv.PlanOptions
) -> None:
    wanted = family.wanted(plan, float(np.float32(0.7)) if plan.compute_dtype == "float32" else 0.7)
    for number, (workers, budget, piece, shard) in enumerate(
        [(1, 512, 64, 5000), (5, 512, 1, 5000), (1, 24, 4, 9), (2, 48, 2, 1)]
    ):
        cut = replace(plan, piece_bytes=piece * MIB, max_shard_bytes=shard * 1_000_000)
        transfer(family, tmp_path / str(number), cut, workers=workers, memory_budget_bytes=budget * MIB)
        assert_same(read_checkpoint(tmp_path / str(number)), wanted)


def test_a_sweep_has_the_bytes_of_single_runs(family: Family, tmp_path: Path) -> None:
    target, donor, reference = family.folders
    alphas = (0.3, 0.0, 1.0)
    recipe = rv.Recipe("transfer", target, (rv.Vector(donor, reference),), tuple((alpha,) for alpha in alphas))
    plan = replace(STOCHASTIC, dtype="bfloat16")
    rv.prepare(recipe, [str(tmp_path / str(alpha)) for alpha in alphas], plan, HOW).run()
    for alpha in (0.3, 1.0):
        assert_same(read_checkpoint(tmp_path / str(alpha)), family.wanted(plan, float(np.float32(alpha))))


def test_another_seed_gives_other_bytes_but_where_nothing_is_rounded(family: Family, tmp_path: Path) -> None:
    made = []
    for seed in (0, 1):
        transfer(family, tmp_path / str(seed), replace(STOCHASTIC, seed=seed))
        made.append(read_checkpoint(tmp_path / str(seed)))
    differ = {name for name in SHAPES if made[0][name] != made[1][name]}
    assert differ == {"embed", "half"}
    plain = [replace(PLAN, rounding=rounding) for rounding in ("nearest", "stochastic")]
    for options in plain:
        donor, reference = family.folders[1:]
        out = str(tmp_path / options.rounding)
        manifest = rv.extract(donor, reference, out, plan_options=options, run_options=HOW)
        assert manifest.options["rounding"] == options.rounding
    assert read_checkpoint(tmp_path / "nearest") == read_checkpoint(tmp_path / "stochastic")


def test_a_vector_is_rounded_stochastically_where_it_is_stored_in_16_bits(family: Family, tmp_path: Path) -> None:
    donor, reference = family.folders[1:]
    plan = replace(STOCHASTIC, dtype="bfloat16")
    rv.extract(donor, reference, str(tmp_path / "v"), plan_options=plan, run_options=HOW)
    exact = {name: difference(family.a[name], family.b[name]) for name in COMPUTED}
    data = {name: stochastic(exact[name], "BF16", seed=SEED, name=f"vector of {name}") for name in COMPUTED}
    assert_same(read_checkpoint(tmp_path / "v"), {name: Raw("BF16", SHAPES[name][1], data[name]) for name in COMPUTED})
    rv.verify_against_inputs(str(tmp_path / "v"))


def test_a_vector_and_a_model_of_one_seed_are_right_on_average(tmp_path: Path) -> None:
    """Both are rounded in each element; by the same bits, the second would know what the first had done."""
    values = (1.0, 1 + 0.3 * 2.0**-7, 0.0)  # the vector goes up in three of ten
    raws = [Raw("F32", (MILLION,), np.full(MILLION, value, np.float32).tobytes()) for value in values]
    t, a, b = (write_checkpoint(tmp_path / role, {"w": raw}) for role, raw in zip("tab", raws, strict=True))
    v, out, plan = str(tmp_path / "v"), str(tmp_path / "out"), rv.PlanOptions(dtype="bfloat16", rounding="stochastic")
    rv.extract(a, b, v, plan_options=plan, run_options=HOW)
    rv.apply(t, {v: 0.5}, out, plan_options=plan, run_options=HOW)
    found = widen(read_checkpoint(out)["w"]).astype(np.float64)
    exact = values[0] + 0.5 * float(np.float32(values[1]))
    assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(MILLION)


class Stop(Exception):
    """Raised by a progress callback."""


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (replace(STOCHASTIC, seed=3), "--seed: then"),
        (PLAN, "--rounding: then stochastic, now nearest"),
        (BOTH, "--compute-dtype: then float32, now float64"),
    ],
)
def test_unfinished_pieces_go_on_with_the_same_options_only(
    family: Family, tmp_path: Path, other: rv.PlanOptions, told: str
) -> None:
    def stop(now: rv.Progress) -> None:
        if now.pieces == 2:
            raise Stop

    out, alpha = str(tmp_path / "out"), 0.5
    one = rv.RunOptions(runtime="local", workers=1)
    with pytest.raises(Stop):
        rv.transfer(*family.folders, out, alpha=alpha, plan_options=STOCHASTIC, run_options=one, progress=stop)
    with pytest.raises(rv.OutputError) as caught:
        rv.transfer(*family.folders, out, alpha=alpha, plan_options=other, run_options=one)
    assert told in str(caught.value)
    manifest = rv.transfer(*family.folders, out, alpha=alpha, plan_options=STOCHASTIC, run_options=one)
    assert manifest.timings.pieces_kept >= 2
    assert_same(read_checkpoint(out), family.wanted(STOCHASTIC, alpha))


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", "12"), ("compute_dtype", "float64"), ("rounding", "nearest"), ("seed", "many"), ("dtype", "float8")],
)
def test_a_manifest_with_another_option_is_found_out(family: Family, tmp_path: Path, option: str, value: str) -> None:
    transfer(family, tmp_path / "out", STOCHASTIC)
    path = tmp_path / "out" / "rv_manifest.json"
    document = json.loads(path.read_bytes())
    document["options"][option] = value
    path.write_bytes(manifest_from(document).sealed().to_json())
    with pytest.raises(rv.VerifyError, match=r"rv_manifest\.json: states other options or alphas than rv_recipe\.yaml"):
        rv.verify_against_inputs(str(tmp_path / "out"))


def test_the_card_says_how_it_was_computed_and_rounded(family: Family, tmp_path: Path) -> None:
    for plan, text in (
        (PLAN, "computed in float32 and rounded once, to nearest;"),
        (replace(BOTH, seed=7), "computed in float64 and rounded once, stochastically with seed 7;"),
    ):
        transfer(family, tmp_path / plan.rounding, plan)
        assert text in (tmp_path / plan.rounding / "README.md").read_text()


def grpo_like(rng: np.random.Generator, share: float) -> tuple[Raw, Raw, Raw]:
    """Target, donor and reference as a GRPO model and its SFT twin are: ``share`` of the weights differ, nine in ten
    of these by one unit in the last place of bfloat16, the others by two or three."""
    reference = weights(rng, "BF16", (MILLION,), 0.02)
    bits = np.frombuffer(reference.data, np.uint16).astype(np.int32)
    steps = rng.choice([1, 2, 3], MILLION, p=[0.9, 0.07, 0.03]) * rng.choice([-1, 1], MILLION)
    moved = bits + np.where(rng.random(MILLION) < share, steps, 0)
    near = widen(reference) + (rng.standard_normal(MILLION) * 1e-3).astype(np.float32)
    target = Raw("BF16", (MILLION,), narrow(near.astype(np.float32), "BF16"))
    return target, Raw("BF16", (MILLION,), moved.astype(np.uint16).tobytes()), reference


def realised_alpha(out: Raw, target: Raw, v: npt.NDArray[np.float64]) -> float:
    moved = widen(out).astype(np.float64) - widen(target)
    return float(moved @ v / (v @ v))


def deviation(target: Raw, v: npt.NDArray[np.float64], alpha: float) -> float:
    """The standard deviation of the realised alpha that unbiased rounding to one of two neighbours has."""
    exact = widen(target).astype(np.float64) + alpha * v
    _, lower, upper = neighbours(exact, "BF16")
    up, down = upper - np.abs(exact), np.abs(exact) - lower
    return math.sqrt(float(np.sum(v * v * up * down))) / float(v @ v)


@pytest.mark.parametrize("alpha", [0.3, 0.7])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.3])
def test_a_million_small_changes_realise_alpha_only_when_rounded_stochastically(
    tmp_path: Path, share: float, alpha: float
) -> None:
    made = grpo_like(np.random.default_rng(67), share)
    roles = ("target", "donor", "reference")
    folders = [write_checkpoint(tmp_path / role, {"w": raw}) for role, raw in zip(roles, made, strict=True)]
    family = Family((folders[0], folders[1], folders[2]), {}, {}, {})
    v = widen(made[1]).astype(np.float64) - widen(made[2])
    assert share * 0.98 < np.count_nonzero(v) / MILLION < share * 1.02

    def found(plan: rv.PlanOptions, name: str) -> float:
        transfer(family, tmp_path / name, plan, alpha)
        return realised_alpha(read_checkpoint(tmp_path / name)["w"], made[0], v)

    assert abs(found(PLAN, "nearest") / alpha - 1) > 0.1
    sigma = deviation(made[0], v, alpha)
    several = [found(replace(STOCHASTIC, seed=seed), f"seed-{seed}") for seed in range(4)]
    for realised in several:
        assert abs(realised - alpha) < 4 * sigma
    assert abs(sum(several) / 4 / alpha - 1) < 0.01
    if share == 0.3:
        assert all(abs(realised / alpha - 1) < 0.01 for realised in several)
