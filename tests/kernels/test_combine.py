"""The kernels against NumPy, bit for bit: every dtype, every special value, and what they measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from reference import Raw, accumulated, any_bits, combined, difference, extracted, narrow, same_bits, weights, widen

from rv_distributed.kernels import Combiner
from rv_distributed.kernels.combine import TORCH_DTYPES
from rv_distributed.measures import Measures
from rv_distributed.recipe import Arithmetic

DTYPES = ("F32", "BF16", "F16")
ALPHAS = (1.0, -1.0, 0.5, 0.7, 1e-3, 0.0)
BLOCK = 1 << 16
DEFAULT = Arithmetic("float32", "nearest", 0)
#: Which elements of which tensor: to nearest, it makes no difference.
WHERE: dict[str, Any] = {"name": "x", "first": 0}


def tensor_of(raw: Raw) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw.data), dtype=TORCH_DTYPES[raw.dtype])


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


def combiner(outputs: int = 1, *, measure: bool = True, weighted: bool = False, block: int = BLOCK) -> Combiner:
    device = torch.device("cpu")
    return Combiner(
        block_elements=block,
        outputs=outputs,
        device=device,
        measure=measure,
        weighted=weighted,
        arithmetic=DEFAULT,
    )


def run_combine(
    target: Raw,
    vectors: Sequence[tuple[Raw, Raw | None]],
    alphas: Sequence[Sequence[float]],
    dtypes: Sequence[str],
    block: int = BLOCK,
) -> tuple[list[Raw], list[Measures]]:
    t = tensor_of(target)
    outs = [torch.empty(t.numel(), dtype=TORCH_DTYPES[dtype]) for dtype in dtypes]
    operands = [(tensor_of(plus), tensor_of(minus) if minus else None) for plus, minus in vectors]
    measures = combiner(len(outs), weighted=len(vectors) > 1, block=block).combine(outs, t, operands, alphas, **WHERE)
    assert bytes_of(t) == target.data, "an input was written to"
    return [Raw(dtype, target.shape, bytes_of(out)) for dtype, out in zip(dtypes, outs, strict=True)], measures


def run_extract(plus: Raw, minus: Raw | None, dtype: str, block: int = BLOCK) -> tuple[Raw, Measures]:
    out = torch.empty(plus.shape[0], dtype=TORCH_DTYPES[dtype])
    measures = combiner(block=block).extract(out, tensor_of(plus), tensor_of(minus) if minus else None, **WHERE)
    return Raw(dtype, plus.shape, bytes_of(out)), measures


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
            assert measures.changed == np.count_nonzero(exact)


@pytest.mark.parametrize("count", [1, 3, 1000, 1 << 18])
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-8, 0.02, 1e3, 1e19, 1e25])
def test_norms_agree_with_float64(scale: float, count: int) -> None:
    rng = np.random.default_rng(23)
    target, plus, minus = weights(rng, "F32", (count,)), *(weights(rng, "F32", (count,), scale) for _ in range(2))
    one: list[tuple[Raw, Raw | None]] = [(plus, minus)]
    several = [*one, (plus, None)]
    _, (single,) = run_combine(target, one, [[0.7]], ["F32"], count)
    _, (double,) = run_combine(target, several, [[0.7, 0.5]], ["F32"], count)
    _, vector = run_extract(plus, minus, "F32", count)
    d = difference(plus, minus).astype(np.float64)
    moved = (accumulated(target, several, [0.7, 0.5]) - widen(target)).astype(np.float64)
    t_sq = np.sum(widen(target).astype(np.float64) ** 2)
    for measures, v in ((single, d), (vector, d), (double, moved)):
        assert math.isclose(measures.v_sq, np.sum(v**2), rel_tol=1e-5)
        assert measures.v_max == np.max(np.abs(v))
    assert math.isclose(single.t_sq, t_sq, rel_tol=1e-5)
    assert double.t_sq == single.t_sq
    assert vector.t_sq == 0.0


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
def test_changed_counts_bits_in_one_dtype_and_values_between_two(target_dtype: str, out_dtype: str) -> None:
    rng = np.random.default_rng(29)
    target, plus = weights(rng, target_dtype, (30_000,)), weights(rng, "F32", (30_000,), scale=3e-4)
    (found,), (measures,) = run_combine(target, [(plus, None)], [[1.0]], [out_dtype])
    if target_dtype == out_dtype:
        unsigned = np.uint32 if out_dtype == "F32" else np.uint16
        changed = np.frombuffer(found.data, unsigned) != np.frombuffer(target.data, unsigned)
    else:
        changed = widen(found) != widen(target)
    assert np.count_nonzero(changed) > 0, "the case changes nothing"
    assert measures.changed == np.count_nonzero(changed)


def test_minus_zero_that_becomes_zero_is_a_change() -> None:
    target = Raw("BF16", (2,), np.array([0x8000, 0], np.uint16).tobytes())
    zero = Raw("BF16", (2,), bytes(4))
    (found,), (measures,) = run_combine(target, [(zero, None)], [[1.0]], ["BF16"])
    assert found.data == bytes(4)
    assert measures.changed == 1


def test_an_output_whose_alphas_are_all_zero_is_the_target_and_measures_no_vector() -> None:
    target, plus = (any_bits(np.random.default_rng(31), "F16", 1000) for _ in range(2))
    (found,), (measures,) = run_combine(target, [(plus, None)], [[0.0]], ["F16"])
    assert found.data == target.data
    assert (measures.v_sq, measures.v_max, measures.changed, measures.inexact) == (0.0, 0.0, 0, 0)


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
    for out, measures in zip(outs, measured, strict=True):
        nonfinite = np.flatnonzero(~np.isfinite(widen(out)))
        assert (measures.nonfinite, measures.first_nonfinite) == (len(nonfinite), nonfinite[0])
    vector, measures = run_extract(raws[1], raws[2], out_dtype)
    nonfinite = np.flatnonzero(~np.isfinite(widen(vector)))
    assert (measures.nonfinite, measures.first_nonfinite) == (len(nonfinite), nonfinite[0])


@pytest.mark.parametrize("value", [1e18, 1e20, 3e37, 3.3e38])
def test_large_finite_values_are_not_taken_for_infinite(value: float) -> None:
    target = Raw("F32", (1000,), np.full(1000, value, np.float32).tobytes())
    nothing = Raw("F32", (1000,), bytes(4000))
    for dtype in ("F32", "BF16"):
        (out,), (measures,) = run_combine(target, [(nothing, None)], [[1.0]], [dtype])
        assert np.all(np.isfinite(widen(out)))
        assert (measures.nonfinite, measures.first_nonfinite) == (0, None)


def test_sums_that_are_too_large_for_the_output_s_dtype_count_as_infinite() -> None:
    target = Raw("F16", (3,), np.array([60000, 1, -60000], np.float16).tobytes())
    plus = Raw("F16", (3,), np.array([6000, 1, -4000], np.float16).tobytes())
    (one, wide), (first, second) = run_combine(target, [(plus, None)], [[0.5], [1.5]], ["F16", "F16"])
    assert np.all(np.isfinite(widen(one)))
    assert (first.nonfinite, first.first_nonfinite) == (0, None)
    assert np.isinf(widen(wide)).tolist() == [True, False, True]
    assert (second.nonfinite, second.first_nonfinite) == (2, 0)


def test_measures_of_blocks_add_up() -> None:
    total = Measures(1.0, 2.0, 0.5, 3, 1).plus(Measures(0.25, 0.5, 0.75, 4, 0, 2, 9)).plus(Measures())
    assert total == Measures(1.25, 2.5, 0.75, 7, 1, 2, 9)


def test_nothing_is_measured_when_nobody_asks() -> None:
    rng = np.random.default_rng(37)
    target, plus = weights(rng, "BF16", (100,)), weights(rng, "BF16", (100,))
    out = torch.empty(100, dtype=torch.bfloat16)
    quiet = combiner(measure=False)
    assert quiet.combine([out], tensor_of(target), [(tensor_of(plus), None)], [[0.7]], **WHERE) == [Measures()]
    assert bytes_of(out) == combined(target, [(plus, None)], [0.7]).data
    assert quiet.extract(out, tensor_of(plus), None, **WHERE) == Measures()
    assert bytes_of(out) == plus.data
