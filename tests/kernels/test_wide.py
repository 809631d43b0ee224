"""All kernels in float64, bit for bit: every dtype, float64 itself too, every special value, and what they measure."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from kernel_runners import DEFAULT, HERE, KERNELS, ByTorch, Kernel, Made
from reference import ITEM_BYTES, Raw, any_bits, weights, widen
from rounding_reference import F64, doubles, nearest, stochastic

from rv_distributed.measures import ULPS_FROM
from rv_distributed.recipe import Arithmetic, Order, Rounding, Stats, Weights

COUNT = 20_000
DTYPES = ("F64", "F32", "BF16", "F16")
NEAREST = Arithmetic("float64", "nearest", 4)
every_kernel = pytest.mark.parametrize("kernel", KERNELS)


def anything(rng: np.random.Generator, dtype: str) -> Raw:
    if dtype != "F64":
        return any_bits(rng, dtype, COUNT)
    # Numbers that the other dtypes have, too: most of all bits are beyond them.
    bits = rng.integers(0, 1 << 64, COUNT, dtype=np.uint64)
    usual = rng.standard_normal(COUNT) * 2.0 ** rng.integers(-160, 130, COUNT)
    return Raw(dtype, (COUNT,), np.where(rng.random(COUNT) < 0.3, bits.view(np.float64), usual).tobytes())


def usual(rng: np.random.Generator, dtype: str) -> Raw:
    if dtype != "F64":
        return weights(rng, dtype, (COUNT,))
    return Raw(dtype, (COUNT,), (rng.standard_normal(COUNT) * 0.05).tobytes())


def rounded(values: F64, dtype: str, rounding: Rounding, name: str, first: int) -> bytes:
    if dtype == "F64":
        return values.tobytes()
    return (
        nearest(values, dtype) if rounding == "nearest" else stochastic(values, dtype, seed=4, name=name, first=first)
    )


def same_bits(found: Raw, wanted: bytes) -> bool:
    bits = f"u{ITEM_BYTES[found.dtype]}"
    nan = np.isnan(doubles(found)) & np.isnan(doubles(found._replace(data=wanted)))
    return bool(np.all((np.frombuffer(found.data, bits) == np.frombuffer(wanted, bits)) | nan))


@every_kernel
@pytest.mark.parametrize("make", [anything, usual])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "sources", [("BF16", "BF16", "BF16"), ("F32", "BF16", "F16"), ("F16", "F64", "F32"), ("F64", "F32", "F64")], ids=str
)
def test_every_step_is_in_float64(kernel: Kernel, make: Any, rounding: Rounding, sources: tuple[str, str, str]) -> None:
    rng, alphas, first = np.random.default_rng(9), (0.7, 0.0, 1.0, -0.3), 77
    target, plus, minus = (make(rng, dtype) for dtype in sources)
    how: Any = {"stats": "none", "arithmetic": NEAREST._replace(rounding=rounding), "first": first}
    with np.errstate(all="ignore"):
        d = doubles(plus) - doubles(minus)
    for dtype in DTYPES:
        rows = [Weights((alpha,)) for alpha in alphas]
        outs, _ = kernel.run(target, [(plus, minus)], rows, [dtype] * len(rows), **how)
        for out, alpha in zip(outs, alphas, strict=True):
            with np.errstate(all="ignore"):
                total = doubles(target) + alpha * d if alpha else doubles(target)
            if alpha == 0 and dtype == target.dtype:
                assert out.data == target.data
            else:
                assert same_bits(out, rounded(total, dtype, rounding, "x", first)), (dtype, alpha)
        (vector,), (measures,) = kernel.run(
            None, [(plus, minus)], [Weights((1.0,))], [dtype], **{**how, "stats": "full"}
        )
        assert same_bits(vector, rounded(d, dtype, rounding, "vector of x", first)), dtype
        stored = doubles(vector)
        assert measures.inexact == np.sum((stored != d) & ~(np.isnan(stored) & np.isnan(d)))


@every_kernel
def test_what_float32_loses_is_there(kernel: Kernel) -> None:
    target, plus, minus = (Raw("F32", (1,), np.float32(value).tobytes()) for value in (1.0, 2.0**-24, -(2.0**-50)))
    for arithmetic, wanted in ((DEFAULT, 1.0), (NEAREST, 1.0 + 2.0**-23)):
        (out,), _ = kernel.run(target, [(plus, minus)], [Weights((1.0,))], ["F32"], arithmetic=arithmetic)
        assert widen(out).tolist() == [wanted]


@every_kernel
@pytest.mark.parametrize(("has_target", "order"), [(False, "fused"), (True, "sum"), (True, "fused")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_that_are_added_up_first_are_in_float64_too(
    kernel: Kernel, has_target: bool, order: Order, dtype: str
) -> None:
    """Of float64 no kernel can round a product and a sum once: ``fused`` is as ``sum``."""
    rng = np.random.default_rng(10)
    target, *models = (usual(rng, of) for of in ("BF16", "F64", "F32", "F16"))
    row = Weights((0.3, -0.7, 1.1), 0.7, 1.3)
    v = np.zeros(COUNT)
    for model, alpha in zip(models, row.alphas, strict=True):
        v = v + alpha * doubles(model)
    v = v / row.divisor * row.scale
    given, arithmetic = target if has_target else None, NEAREST._replace(order=order)
    vectors = [(model, None) for model in models]
    (out,), _ = kernel.run(given, vectors, [row], [dtype], arithmetic=arithmetic, weighted=True)
    assert same_bits(out, rounded(doubles(target) + v if has_target else v, dtype, "nearest", "x", 0))


def places(raw: Raw) -> list[int]:
    """Of every element in the sequence of all numbers of its dtype, with one zero."""
    top = 1 << (8 * ITEM_BYTES[raw.dtype] - 1)
    bits = np.frombuffer(raw.data, f"u{ITEM_BYTES[raw.dtype]}").tolist()
    return [top - value if value >= top else value for value in bits]


@every_kernel
@pytest.mark.parametrize("make", [anything, usual])
@pytest.mark.parametrize("stats", ["full", "basic", "none"])
@pytest.mark.parametrize("sources", [("BF16", "F32", "BF16"), ("F64", "F64", "F64"), ("F64", "BF16", "F16")], ids=str)
def test_measures_are_those_of_the_definitions(
    kernel: Kernel, make: Any, stats: Stats, sources: tuple[str, str, str]
) -> None:
    rng, alpha = np.random.default_rng(11), 0.7
    target, plus, minus = (make(rng, dtype) for dtype in sources)
    with np.errstate(all="ignore"):
        t, v = doubles(target), doubles(plus) - doubles(minus)
    for dtype in DTYPES:
        (out,), (found,) = kernel.run(
            target, [(plus, minus)], [Weights((alpha,))], [dtype], stats=stats, arithmetic=NEAREST
        )
        o = doubles(out)
        infinite, finite = np.isinf(o), np.isfinite(o)
        assert (found.nan, found.infinite) == (np.sum(np.isnan(o)), np.sum(infinite))
        assert found.overflowed == np.sum(infinite & np.isfinite(t) & np.isfinite(v))
        assert found.first_nonfinite == (None if finite.all() else int(np.argmin(finite)))
        if stats == "none":
            assert found.nonzero == found.changed == 0
            continue
        base = Raw(dtype, (COUNT,), target.data if dtype == target.dtype else rounded(t, dtype, "nearest", "x", 0))
        steps = [abs(a - b) for a, b in zip(places(out), places(base), strict=True)]
        same = (np.array(steps, object) == 0) | (np.isnan(o) & np.isnan(t))
        known = [step for step, is_known in zip(steps, finite & np.isfinite(t), strict=True) if is_known]
        assert found.changed == COUNT - np.sum(same)
        assert found.nonzero == np.sum(v != 0)
        assert found.absorbed == np.sum(same & (v != 0))
        assert found.ulps_max == min(max(known), 2**63 - 1)
        assert math.isclose(found.v_max, float(np.max(np.abs(v)))) or np.isnan(v).any()
        assert math.isnan(found.v_max) == bool(np.isnan(v).any())
        if stats == "full":
            edges = [*ULPS_FROM, 1 << 70]
            assert found.ulps == tuple(sum(low <= step < high for step in known) for low, high in pairwise(edges))
        if make is usual:
            assert found.v_sq == pytest.approx(np.sum(v * v), rel=1e-12)
            assert found.t_sq == pytest.approx(np.sum(t * t), rel=1e-12)
        if make is usual and stats == "full":
            assert found.v_t == pytest.approx(np.sum(v * t), rel=1e-9)
            assert found.moved_v == pytest.approx(np.sum((o - t) * v), rel=1e-9)
            assert found.error_sq == pytest.approx(np.sum((o - t - alpha * v) ** 2), rel=1e-9, abs=1e-30)


@every_kernel
def test_more_steps_than_64_bits_count_are_the_most_that_they_do(kernel: Kernel) -> None:
    target, plus = (Raw("F64", (1,), np.float64(value).tobytes()) for value in (-7e307, 1e308))
    (out,), (measures,) = kernel.run(target, [(plus, None)], [Weights((1.5,))], ["F64"], arithmetic=NEAREST)
    assert doubles(out).tolist() == [1.5 * 1e308 - 7e307]
    assert (measures.changed, measures.ulps_max, measures.ulps[-1]) == (1, 2**63 - 1, 1)


@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 1501, (1 << 33) + 7])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("kernel", [HERE["compiled"], pytest.param(ByTorch("cuda"), marks=pytest.mark.gpu)])
def test_stochastic_rounding_has_one_result_in_all_kernels(kernel: Kernel, dtype: str, first: int) -> None:
    rng = np.random.default_rng(12)
    target, plus = anything(rng, dtype), anything(rng, "F64")
    arithmetic = NEAREST._replace(rounding="stochastic")

    def made(by: Kernel) -> Made:
        rows = [Weights((alpha,)) for alpha in (0.3, 1.0)]
        return by.run(target, [(plus, None)], rows, [dtype] * 2, stats="basic", arithmetic=arithmetic, first=first)

    (outs, measured), (others, wanted) = made(kernel), made(HERE["torch"])
    assert all(same_bits(out, other.data) for out, other in zip(outs, others, strict=True))
    assert [of.changed for of in measured] == [of.changed for of in wanted]
