"""The kernels against NumPy, bit for bit: every dtype, every special value, and what they measure."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from kernel_runners import DEFAULT, KERNELS, ByTorch, Compiled, Kernel, Vectors
from reference import (
    F32,
    ITEM_BYTES,
    Array,
    Raw,
    any_bits,
    combined,
    difference,
    extracted,
    narrow,
    same_bits,
    weights,
    widen,
)

from rv_distributed.measures import ULPS_FROM, Measures
from rv_distributed.recipe import Arithmetic, Stats, Weights

DTYPES = ("F32", "BF16", "F16")
ALPHAS = (1.0, -1.0, 0.5, 0.7, 1e-3, 0.0)


@pytest.fixture(params=KERNELS, autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """All kernels are held to all of this."""
    monkeypatch.setattr(sys.modules[__name__], "KERNEL", request.param)
    found: Kernel = request.param
    return found


KERNEL: Kernel = Compiled()
#: Of tensors that get one vector of several.
WEIGHTED = False


def run_combine(
    target: Raw,
    vectors: Vectors,
    alphas: Sequence[Sequence[float]],
    dtypes: Sequence[str],
    stats: Stats = "full",
    arithmetic: Arithmetic = DEFAULT,
    first: int = 0,
) -> tuple[list[Raw], list[Measures]]:
    # As a plan gives them.
    rounded = [[float(np.float32(alpha)) for alpha in row] for row in alphas]
    rows = [Weights(tuple(row)) for row in rounded]
    return KERNEL.run(target, vectors, rows, dtypes, stats=stats, arithmetic=arithmetic, first=first, weighted=WEIGHTED)


def run_extract(plus: Raw, minus: Raw | None, dtype: str, stats: Stats = "full") -> tuple[Raw, Measures]:
    (raw,), (measures,) = KERNEL.run(None, [(plus, minus)], [Weights((1.0,))], [dtype], stats=stats)
    return raw, measures


def specials(dtype: str) -> Raw:
    """±0, the smallest and largest subnormals and normals, ±1 and its neighbours, ±inf, NaNs quiet and signalling."""
    top = {"F32": (8, 23), "BF16": (8, 7), "F16": (5, 10)}[dtype]
    exponents, mantissa = (1 << top[0]) - 1, (1 << top[1]) - 1
    one = (exponents >> 1) << top[1]
    magnitudes = [0, 1, 2, mantissa, mantissa + 1, one - 1, one, one + 1, one + mantissa]
    magnitudes += [(exponents << top[1]) - 1, exponents << top[1], (exponents << top[1]) + 1, (1 << sum(top)) - 1]
    unsigned = np.uint32 if dtype == "F32" else np.uint16
    bits = np.array(magnitudes + [value | 1 << sum(top) for value in magnitudes], unsigned)
    return Raw(dtype, bits.shape, bits.tobytes())


def crossed(*raws: Raw) -> list[Raw]:
    """Every combination of the tensors' elements, as tensors of equal length."""
    arrays = [np.frombuffer(raw.data, f"u{len(raw.data) // raw.shape[0]}") for raw in raws]
    grids = [np.ascontiguousarray(grid).reshape(-1) for grid in np.meshgrid(*arrays, indexing="ij")]
    return [Raw(raw.dtype, grid.shape, grid.tobytes()) for raw, grid in zip(raws, grids, strict=True)]


@pytest.mark.parametrize("plus_dtype", DTYPES)
@pytest.mark.parametrize("minus_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
def test_one_vector_has_the_reference_bits_in_every_mixture_of_dtypes(
    target_dtype: str, plus_dtype: str, minus_dtype: str
) -> None:
    rng = np.random.default_rng(7)
    target, plus, minus = (weights(rng, dtype, (3001,)) for dtype in (target_dtype, plus_dtype, minus_dtype))
    for alpha in ALPHAS:
        for dtype in DTYPES:
            (found,), _ = run_combine(target, [(plus, minus)], [[alpha]], [dtype])
            wanted = combined(target, [(plus, minus)], [alpha], dtype)
            assert same_bits(found.data, wanted.data, dtype), (alpha, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_bit_patterns_have_the_reference_bits(dtype: str) -> None:
    rng = np.random.default_rng(11)
    target, plus, minus = (any_bits(rng, dtype, 40_000) for _ in range(3))
    for alpha in ALPHAS:
        (found,), _ = run_combine(target, [(plus, minus)], [[alpha]], [dtype])
        assert same_bits(found.data, combined(target, [(plus, minus)], [alpha]).data, dtype), alpha


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values_combine_as_the_reference_does_in_all_triples(dtype: str) -> None:
    values = specials(dtype)
    target, plus, minus = crossed(values, values, values)
    for alpha in ALPHAS:
        for out in DTYPES:
            (found,), _ = run_combine(target, [(plus, minus)], [[alpha]], [out])
            assert same_bits(found.data, combined(target, [(plus, minus)], [alpha], out).data, out), (alpha, out)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_bfloat16_pattern_as_donor_has_the_reference_bits(alpha: float) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    plus = Raw("BF16", every.shape, every.tobytes())
    fixed = np.array([0.0, -0.0, 1.0, -2.5, 3e-39, 0.0078125, 3.3e38], np.float32)
    for t, b in [(0, 1), (1, 0), (2, 3), (4, 4), (5, 2), (6, 6)]:
        target, minus = (Raw("BF16", every.shape, narrow(np.full(1 << 16, fixed[n]), "BF16")) for n in (t, b))
        (found,), _ = run_combine(target, [(plus, minus)], [[alpha]], ["BF16"])
        assert same_bits(found.data, combined(target, [(plus, minus)], [alpha]).data, "BF16"), (fixed[t], fixed[b])


@pytest.mark.parametrize(("dtype", "step"), [("BF16", 2.0**-7), ("F16", 2.0**-10)])
def test_ties_round_to_the_even_neighbour(dtype: str, step: float) -> None:
    count = 64
    base = Raw("F32", (count,), np.ones(count, np.float32).tobytes())
    ties = ((np.arange(count) + 0.5) * step).astype(np.float32)
    (found,), _ = run_combine(base, [(Raw("F32", (count,), ties.tobytes()), None)], [[1.0]], [dtype])
    multiples = (widen(found) - 1) / np.float32(step)
    assert multiples.tolist() == [n + n % 2 for n in range(count)]


def test_alpha_is_used_in_float32_and_not_in_bfloat16() -> None:
    zero, one = (Raw("F32", (4,), np.full(4, value, np.float32).tobytes()) for value in (0, 1))
    (found,), _ = run_combine(zero, [(one, None)], [[0.7]], ["F32"])
    assert widen(found).tolist() == [float(np.float32(0.7))] * 4
    zero16, big = (Raw("BF16", (4,), narrow(np.full(4, value, np.float32), "BF16")) for value in (0, 1.4296875))
    (found,), _ = run_combine(zero16, [(big, None)], [[0.7]], ["F32"])
    assert widen(found)[0] == np.float32(0.7) * np.float32(1.4296875) != np.float32(0.69921875 * 1.4296875)


def test_several_vectors_are_added_in_order_with_a_rounding_each() -> None:
    rng = np.random.default_rng(13)
    target = weights(rng, "BF16", (5000,))
    vectors: list[tuple[Raw, Raw | None]] = [
        (weights(rng, "F16", (5000,)), weights(rng, "BF16", (5000,))),
        (weights(rng, "F32", (5000,), scale=3e3), None),
        (weights(rng, "F32", (5000,), scale=1e-4), None),
    ]
    rows = [[0.7, -1.0, 0.5], [0.0, 1e-3, 0.0], [1.0, 0.0, 1e-3], [0.0, 0.0, 0.0]]
    found, _ = run_combine(target, vectors, rows, ["F32"] * 4)
    for raw, row in zip(found, rows, strict=True):
        assert same_bits(raw.data, combined(target, vectors, row, "F32").data, "F32"), row
    backwards, _ = run_combine(target, vectors[::-1], [rows[0][::-1]], ["F32"])
    assert backwards[0].data != found[0].data, "the case does not tell one order from another"


def test_several_outputs_at_once_equal_one_at_a_time() -> None:
    rng = np.random.default_rng(17)
    target, plus, minus = (any_bits(rng, "BF16", 9000) for _ in range(3))
    together, measured = run_combine(target, [(plus, minus)], [[alpha] for alpha in ALPHAS], ["BF16"] * len(ALPHAS))
    for alpha, raw, measures in zip(ALPHAS, together, measured, strict=True):
        (alone,), (alone_measures,) = run_combine(target, [(plus, minus)], [[alpha]], ["BF16"])
        assert raw.data == alone.data
        assert repr(measures) == repr(alone_measures)


@pytest.mark.parametrize("plus_dtype", DTYPES)
@pytest.mark.parametrize("minus_dtype", [*DTYPES, None])
def test_extract_has_the_reference_bits_and_counts_what_was_not_exact(plus_dtype: str, minus_dtype: str | None) -> None:
    rng = np.random.default_rng(19)
    for make in (any_bits, lambda r, d, n: weights(r, d, (n,))):
        plus, minus = make(rng, plus_dtype, 20_000), make(rng, minus_dtype, 20_000) if minus_dtype else None
        exact = difference(plus, minus)
        for dtype in DTYPES:
            found, measures = run_extract(plus, minus, dtype)
            assert same_bits(found.data, extracted(plus, minus, dtype).data, dtype)
            stored = widen(found)
            assert measures.inexact == np.sum((stored != exact) & ~(np.isnan(stored) & np.isnan(exact)))
            assert measures.nonzero == np.count_nonzero(exact)


def bits_of(raw: Raw) -> Array:
    """The place of every element in the sequence of all numbers of its dtype, with one zero."""
    unsigned = np.frombuffer(raw.data, f"u{ITEM_BYTES[raw.dtype]}").astype(np.int64)
    top = 1 << (8 * ITEM_BYTES[raw.dtype] - 1)
    return np.where(unsigned >= top, top - unsigned, unsigned)


def expected(target: Raw | None, v: F32, alpha: float, out: Raw) -> Measures:
    """All measures in float64, from their definitions, of finite elements."""
    t = np.zeros_like(v) if target is None else widen(target)
    base = Raw(
        out.dtype, out.shape, narrow(t, out.dtype) if target is None or target.dtype != out.dtype else target.data
    )
    t64, v64, o64 = (values.astype(np.float64) for values in (t, v, widen(out)))
    steps = np.abs(bits_of(out) - bits_of(base))
    edges = [*ULPS_FROM, 1 << 62]
    error = (o64 - t64) - float(np.float32(alpha)) * v64
    return Measures(
        v_sq=float(np.sum(v64**2)),
        t_sq=float(np.sum(t64**2)),
        v_t=float(np.sum(v64 * t64)),
        moved_v=float(np.sum((o64 - t64) * v64)),
        error_sq=float(np.sum(error**2)),
        v_max=float(np.max(np.abs(v64))),
        nonzero=int(np.count_nonzero(v64)),
        changed=int(np.count_nonzero(steps)),
        absorbed=int(np.count_nonzero((steps == 0) & (v64 != 0))) if alpha else 0,
        ulps_max=int(np.max(steps)),
        inexact=int(np.count_nonzero(o64 != v64)) if target is None else 0,
        ulps=tuple(int(np.sum((low <= steps) & (steps < high))) for low, high in pairwise(edges)),
    )


def assert_measured(found: Measures, wanted: Measures) -> None:
    """Counts are equal; sums to the rounding of float64, of what they are made of."""
    for name, value, other in zip(Measures._fields, found, wanted, strict=True):
        if isinstance(value, float) and isinstance(other, float):
            scale = {"v_t": wanted.v_sq * wanted.t_sq, "moved_v": wanted.v_sq * (wanted.t_sq + wanted.v_sq)}
            slack = 1e-9 * math.sqrt(scale.get(name, 0.0))
            assert math.isclose(value, other, rel_tol=1e-9, abs_tol=slack), (name, value, other)
        else:
            assert value == other, (name, value, other)


@pytest.mark.parametrize("count", [1, 3, 2048, 5001])
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-8, 1e-3, 0.02, 1e3, 1e19])
def test_measures_are_those_of_float64(scale: float, count: int) -> None:
    rng = np.random.default_rng(23)
    target, plus, minus = weights(rng, "F32", (count,)), *(weights(rng, "F32", (count,), scale) for _ in range(2))
    (out,), (single,) = run_combine(target, [(plus, minus)], [[0.7]], ["F32"])
    assert_measured(single, expected(target, difference(plus, minus), 0.7, out))
    vector, measured = run_extract(plus, minus, "F32")
    assert_measured(measured, expected(None, difference(plus, minus), 1.0, vector))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_measures_of_every_mixture_of_dtypes(alpha: float, target_dtype: str, out_dtype: str) -> None:
    rng = np.random.default_rng(29)
    target, minus = (weights(rng, target_dtype, (30_000,)) for _ in range(2))
    # Reinforcement learning leaves most weights alone, and moves others by little.
    moved = np.where(rng.random(30_000) < 0.3, widen(minus) * np.float32(1.01), widen(minus))
    plus = Raw(target_dtype, minus.shape, narrow(moved.astype(np.float32), target_dtype))
    (out,), (measures,) = run_combine(target, [(plus, minus)], [[alpha]], [out_dtype])
    wanted = expected(target, difference(plus, minus), alpha, out)
    assert_measured(measures, wanted)
    assert 0 < wanted.nonzero < 15_000, "the case has no vector to speak of"
    vector, found = run_extract(plus, minus, out_dtype)
    assert_measured(found, expected(None, difference(plus, minus), 1.0, vector))


def test_of_several_vectors_their_weighted_sum_is_measured() -> None:
    rng = np.random.default_rng(31)
    target = weights(rng, "BF16", (5000,))
    vectors: list[tuple[Raw, Raw | None]] = [
        (weights(rng, "F32", (5000,), 1e-3), None),
        (weights(rng, "BF16", (5000,)), weights(rng, "BF16", (5000,))),
    ]
    rows = [[0.7, -0.5], [0.0, 1.0], [0.3, 0.0], [0.0, 0.0]]
    outs, measured = run_combine(target, vectors, rows, ["BF16"] * 4)
    for out, measures, row in zip(outs, measured, rows, strict=True):
        v = np.zeros(5000, np.float32)
        for (plus, minus), alpha in zip(vectors, row, strict=True):
            v = v + np.float32(alpha) * difference(plus, minus)
        assert_measured(measures, expected(target, v, 1.0, out))


def test_of_one_vector_of_several_its_weighted_self_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WEIGHTED", True)
    rng = np.random.default_rng(33)
    target, plus = weights(rng, "BF16", (5000,)), weights(rng, "BF16", (5000,), 1e-2)
    outs, measured = run_combine(target, [(plus, None)], [[0.5], [0.0], [-0.3]], ["BF16"] * 3)
    for out, measures, alpha in zip(outs, measured, (0.5, 0.0, -0.3), strict=True):
        assert_measured(measures, expected(target, np.float32(alpha) * widen(plus), 1.0, out))


def test_a_change_by_one_unit_in_the_last_place_is_one_step_across_zero_and_exponents_too() -> None:
    bits = np.array([0x3F80, 0x3F7F, 0x0000, 0x8000, 0x0001, 0xC000], np.uint16)
    wanted = np.array([0x3F81, 0x3F80, 0x0001, 0x8001, 0x8001, 0xBFFF], np.uint16)
    target, goal = (Raw("BF16", bits.shape, values.tobytes()) for values in (bits, wanted))
    (out,), (measures,) = run_combine(target, [(goal, target)], [[1.0]], ["BF16"])
    assert out.data == goal.data
    assert (measures.changed, measures.ulps_max, measures.ulps) == (6, 2, (5, 1, 0, 0, 0, 0, 0, 0))


def test_minus_zero_that_becomes_zero_is_no_change() -> None:
    target = Raw("BF16", (2,), np.array([0x8000, 0], np.uint16).tobytes())
    zero = Raw("BF16", (2,), bytes(4))
    (found,), (measures,) = run_combine(target, [(zero, None)], [[1.0]], ["BF16"])
    assert found.data == bytes(4)
    assert (measures.changed, measures.absorbed, measures.ulps_max) == (0, 0, 0)


def test_an_output_whose_alphas_are_all_zero_is_the_target_bit_for_bit() -> None:
    target, plus = (any_bits(np.random.default_rng(31), "F16", 1000) for _ in range(2))
    (found,), (measures,) = run_combine(target, [(plus, None)], [[0.0]], ["F16"])
    assert found.data == target.data
    assert (measures.changed, measures.absorbed, measures.inexact) == (0, 0, 0)
    assert measures.nan + measures.infinite == int(np.count_nonzero(~np.isfinite(widen(target))))


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("alphas", [[[0.7]], [[0.7], [0.0], [-3.0]], [[1.0]]], ids=str)
def test_what_is_nan_or_infinite_in_an_output_is_counted(alphas: list[list[float]], out_dtype: str) -> None:
    rng = np.random.default_rng(41)
    places = rng.choice(5000, 60, replace=False)
    target, plus, minus = (weights(rng, "F32", (5000,)) for _ in range(3))
    raws = []
    for raw, spoilt in zip((target, plus, minus), np.split(places, 3), strict=True):
        values = np.frombuffer(raw.data, np.float32).copy()
        values[spoilt] = rng.choice([np.nan, np.inf, -np.inf, 3e38], len(spoilt))
        raws.append(Raw("F32", raw.shape, values.tobytes()))
    outs, measured = run_combine(raws[0], [(raws[1], raws[2])], alphas, [out_dtype] * len(alphas))
    t, d = widen(raws[0]), difference(raws[1], raws[2])
    for out, measures in zip(outs, measured, strict=True):
        assert_nonfinite(measures, out, t, d)
    vector, measures = run_extract(raws[1], raws[2], out_dtype)
    assert_nonfinite(measures, vector, np.zeros_like(d), d)


def assert_nonfinite(found: Measures, out: Raw, t: F32, v: F32) -> None:
    values = widen(out)
    infinite = np.isinf(values)
    assert (found.nan, found.infinite) == (int(np.sum(np.isnan(values))), int(np.sum(infinite)))
    assert found.overflowed == np.count_nonzero(infinite & np.isfinite(t) & np.isfinite(v))
    assert found.first_nonfinite == np.flatnonzero(~np.isfinite(values))[0]
    base = narrow(t, out.dtype)
    steps = np.abs(bits_of(out) - bits_of(Raw(out.dtype, out.shape, base)))
    known = np.isfinite(values) & np.isfinite(t)
    assert found.ulps_max == np.max(steps[known])
    assert sum(found.ulps) == np.count_nonzero(steps[known])
    assert math.isnan(found.v_max) == bool(np.any(np.isnan(v)))


@pytest.mark.parametrize("value", [1e18, 1e20, 3e37, 3.3e38])
def test_large_finite_values_are_not_taken_for_infinite(value: float) -> None:
    target = Raw("F32", (1000,), np.full(1000, value, np.float32).tobytes())
    nothing = Raw("F32", (1000,), bytes(4000))
    for dtype in ("F32", "BF16"):
        (out,), (measures,) = run_combine(target, [(nothing, None)], [[1.0]], [dtype])
        assert np.all(np.isfinite(widen(out)))
        assert (measures.nan, measures.infinite, measures.first_nonfinite) == (0, 0, None)


def test_sums_that_are_too_large_for_the_output_s_dtype_count_as_infinite() -> None:
    target = Raw("F16", (3,), np.array([60000, 1, -60000], np.float16).tobytes())
    plus = Raw("F16", (3,), np.array([6000, 1, -4000], np.float16).tobytes())
    (one, wide), (first, second) = run_combine(target, [(plus, None)], [[0.5], [1.5]], ["F16", "F16"])
    assert np.all(np.isfinite(widen(one)))
    assert (first.infinite, first.first_nonfinite) == (0, None)
    assert np.isinf(widen(wide)).tolist() == [True, False, True]
    assert (second.infinite, second.overflowed, second.first_nonfinite) == (2, 2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_less_is_measured_when_less_is_asked_for(dtype: str) -> None:
    rng = np.random.default_rng(37)
    target, plus, minus = (weights(rng, dtype, (3000,)) for _ in range(3))
    (out,), (full,) = run_combine(target, [(plus, minus)], [[0.7]], [dtype])
    (same,), (basic,) = run_combine(target, [(plus, minus)], [[0.7]], [dtype], "basic")
    (again,), (nothing,) = run_combine(target, [(plus, minus)], [[0.7]], [dtype], "none")
    assert out.data == same.data == again.data
    only_full = {"v_t": 0.0, "moved_v": 0.0, "error_sq": 0.0, "ulps": Measures().ulps}
    wanted = full._replace(**only_full)  # type: ignore[arg-type]
    assert_measured(basic, wanted)
    assert nothing == Measures()
    vector, nothing = run_extract(plus, minus, dtype, "none")
    assert vector.data == extracted(plus, minus, dtype).data
    assert nothing == Measures()


def test_nan_is_counted_even_when_nothing_is_measured() -> None:
    target = Raw("BF16", (3,), np.array([0x3F80, 0x7FC0, 0xFF80], np.uint16).tobytes())
    (_,), (measures,) = run_combine(target, [(target, target)], [[0.5]], ["BF16"], "none")
    assert (measures.nan, measures.infinite, measures.first_nonfinite) == (2, 0, 1)


@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 1501, (1 << 33) - 2801, (1 << 33) + 7])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize(
    "make", [any_bits, lambda rng, dtype, count: weights(rng, dtype, (count,))], ids=["any", "usual"]
)
def test_stochastic_rounding_has_one_result_in_all_kernels(make: Any, dtype: str, first: int) -> None:
    rng, arithmetic = np.random.default_rng(43), Arithmetic("float32", "stochastic", 7)
    target, plus, minus = (make(rng, source, 6000) for source in (dtype, "F32", dtype))
    rows, vectors = [Weights((alpha,)) for alpha in (0.3, 0.0, 1.0)], [(plus, minus)]
    how: Any = {"stats": "basic", "arithmetic": arithmetic, "first": first}
    wanted, others = Compiled().run(target, vectors, rows, [dtype] * 3, **how)
    (vector,), _ = Compiled().run(None, vectors, [Weights((1.0,))], [dtype], **how)
    for kernel in (ByTorch("cpu"), KERNEL):
        found, measured = kernel.run(target, vectors, rows, [dtype] * 3, **how)
        for raw, other in zip(found, wanted, strict=True):
            assert same_bits(raw.data, other.data, dtype)
        assert [m.changed for m in measured] == [m.changed for m in others]
        (same,), _ = kernel.run(None, vectors, [Weights((1.0,))], [dtype], **how)
        assert same_bits(same.data, vector.data, dtype)
