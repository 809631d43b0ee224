"""Rounding against NumPy, bit for bit: exact where it must be exact, and stochastic with the exact expectation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kernel_runners import KERNELS, Kernel
from reference import Raw, same_bits, weights, widen
from rounding_reference import nearest, neighbours, stochastic

from rv_distributed.kernels.combine import TORCH_DTYPES
from rv_distributed.kernels.rounding import Rounder, _by_comparison
from rv_distributed.recipe import Arithmetic, ComputeDType, Rounding, Weights

CPU = torch.device("cpu")
SMALL = ("BF16", "F16")
Floats = npt.NDArray[Any]
COMPUTE: dict[ComputeDType, type[Any]] = {"float32": np.float32, "float64": np.float64}
#: The largest number, and what would come next.
TOPS = {"BF16": (float(np.frombuffer(b"\0\0\x7f\x7f", np.float32)[0]), 2.0**128), "F16": (65504.0, 65536.0)}
#: The smallest number.
LEAST = {"BF16": 2.0**-133, "F16": 2.0**-24}


def rounded(
    values: Floats, dtype: str, rounding: Rounding, *, seed: int = 0, first: int = 0, device: torch.device = CPU
) -> bytes:
    arithmetic = Arithmetic("float32" if values.dtype == np.float32 else "float64", rounding, seed)
    rounder = Rounder(arithmetic, block_elements=values.size, device=device)
    out = torch.empty(values.size, dtype=TORCH_DTYPES[dtype], device=device)
    given = torch.from_numpy(values.copy()).to(device)
    rounder.round(given, out, name="x", first=first)
    assert given.cpu().numpy().tobytes() == values.tobytes(), "what is rounded was written to"
    return out.cpu().view(torch.uint8).numpy().tobytes()


def edges(dtype: str, kind: type[Any]) -> Floats:
    """Zeros, NaN, infinities; all around subnormals, powers of two, ties, the largest number and overflow."""
    top, beyond = TOPS[dtype]
    least = LEAST[dtype]
    digits = 8 if dtype == "BF16" else 11
    marks = [least * factor for factor in (0.25, 0.5, 0.75, 1, 1.25, 1.5, 2.5, 3, 2.0 ** (digits - 1))]
    marks += [0.02, 1.0, 1 + 2.0**-digits, 1 + 3 * 2.0**-digits, top, (top + beyond) / 2, beyond, least * 2.0**-40]
    marks += [1 + 2.0**-digits + 2.0**-30, 1 + 2.0**-digits - 2.0**-30, 1 + 2.0**-digits + 2.0**-50]
    with np.errstate(over="ignore", under="ignore"):
        here = np.array(marks).astype(kind)
        around = [here, np.nextafter(here, kind(0)), np.nextafter(here, kind(np.inf))]
    special = np.array(
        [0.0, np.nan, np.inf, np.finfo(kind).max, np.finfo(kind).tiny, np.finfo(kind).smallest_subnormal]
    )
    one_side = np.concatenate([*around, special.astype(kind)]).astype(kind)
    return np.concatenate([one_side, -one_side])


def scattered(rng: np.random.Generator, kind: type[Any], count: int) -> Floats:
    """Any bits, and ordinary numbers of all the magnitudes that 16 bits have."""
    width = np.dtype(kind).itemsize
    anything = np.frombuffer(rng.bytes(count * width), kind)
    ordinary = (rng.standard_normal(count) * 2.0 ** rng.integers(-140, 125, count)).astype(kind)
    return np.concatenate([anything, ordinary, (rng.standard_normal(count) * 0.02).astype(kind)])


@pytest.mark.parametrize("kind", COMPUTE.values())
@pytest.mark.parametrize("dtype", ["F32", *SMALL])
def test_to_nearest_has_the_reference_bits(dtype: str, kind: type[Any]) -> None:
    values = [scattered(np.random.default_rng(5), kind, 50_000), *(edges(small, kind) for small in SMALL)]
    for given in values:
        assert same_bits(rounded(given, dtype, "nearest"), nearest(given, dtype), dtype)


@pytest.mark.parametrize("dtype", SMALL)
def test_float64_is_not_rounded_twice(dtype: str) -> None:
    """Just beside a tie that float32 would make a tie: torch's own conversion goes the wrong way here."""
    digits = 8 if dtype == "BF16" else 11
    values = np.array([1 + 2.0**-digits + 2.0**-40, 1 + 3 * 2.0**-digits - 2.0**-40])
    found = widen(Raw(dtype, (2,), rounded(values, dtype, "nearest")))
    assert found.tolist() == [1 + 2.0 ** (1 - digits)] * 2
    assert torch.from_numpy(values).to(TORCH_DTYPES[dtype]).tolist() != found.tolist(), "torch has learnt it"


@pytest.mark.parametrize("kind", COMPUTE.values())
@pytest.mark.parametrize("dtype", ["F32", *SMALL])
@pytest.mark.parametrize("first", [0, 1, (1 << 32) - 100])
def test_stochastic_has_the_reference_bits(dtype: str, kind: type[Any], first: int) -> None:
    values = [scattered(np.random.default_rng(6), kind, 50_000), *(np.tile(edges(small, kind), 50) for small in SMALL)]
    for given in values:
        wanted = stochastic(given, dtype, seed=9, name="x", first=first)
        assert same_bits(rounded(given, dtype, "stochastic", seed=9, first=first), wanted, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", COMPUTE.values())
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_gpu_rounds_as_the_cpu_does(kind: type[Any], rounding: Rounding) -> None:
    given = scattered(np.random.default_rng(7), kind, 100_000)
    for dtype in ("F32", *SMALL):
        on_cpu, on_gpu = (rounded(given, dtype, rounding, device=torch.device(name)) for name in ("cpu", "cuda"))
        assert same_bits(on_gpu, on_cpu, dtype)


@pytest.mark.parametrize("kind", COMPUTE.values())
@pytest.mark.parametrize("dtype", SMALL)
def test_what_the_dtype_holds_stays_and_what_overflows_does_as_to_nearest(dtype: str, kind: type[Any]) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        held = widen(Raw(dtype, every.shape, every.tobytes())).astype(kind)
    for seed in range(4):
        assert same_bits(rounded(held, dtype, "stochastic", seed=seed), every.tobytes(), dtype)
    top, beyond = TOPS[dtype]
    middle = kind((top + beyond) / 2)
    above = np.array([top, np.nextafter(middle, kind(0)), middle, np.finfo(kind).max, np.inf, np.nan], kind)
    for given in (above, -above):
        for seed in range(4):
            found = widen(Raw(dtype, (6,), rounded(given, dtype, "stochastic", seed=seed)))
            assert np.abs(found[:5]).tolist() == [top, top, np.inf, np.inf, np.inf]
            assert np.array_equal(np.signbit(found[:5]), np.signbit(given[:5]))
            assert np.isnan(found[5])


def fraction_up(value: Any, dtype: str) -> Fraction:
    """The exact probability with which a finite value has to become the larger neighbour."""
    _, lower, upper = neighbours(np.array([value]), dtype)
    return (abs(Fraction(float(value))) - Fraction(lower[0])) / (Fraction(upper[0]) - Fraction(lower[0]))


def inner(dtype: str, kind: type[Any]) -> Floats:
    """Values below the largest number."""
    values = np.concatenate([edges(dtype, kind), scattered(np.random.default_rng(8), kind, 40)])
    within: Floats = values[np.abs(values) < kind(TOPS[dtype][0])]
    return within


def test_float32_to_bfloat16_has_the_exact_expectation() -> None:
    """Over all noise that there is: the share that goes up is the fraction, to the last bit."""
    noise = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    rounder = Rounder(Arithmetic("float32", "stochastic", 0), block_elements=1 << 16, device=CPU)
    out = torch.empty(1 << 16, dtype=torch.bfloat16)
    for value in inner("BF16", np.float32):
        rounder._to_bfloat16(torch.full((1 << 16,), float(value)), out, noise)
        found, counts = np.unique(out.double().numpy(), return_counts=True)
        total = Fraction(0)
        for one, count in zip(found.tolist(), counts.tolist(), strict=True):
            total += Fraction(one) * count
        assert total / (1 << 16) == Fraction(float(value)), value


@pytest.mark.parametrize(
    ("kind", "dtype", "random_bits"), [(np.float32, "F16", 23), (np.float64, "BF16", 32), (np.float64, "F16", 32)]
)
def test_other_rounding_has_the_expectation_to_the_last_random_bit(
    kind: type[Any], dtype: str, random_bits: int
) -> None:
    """The numbers below the fraction go up and the others do not; there are as many as the fraction says."""
    values, every = inner(dtype, kind), 1 << random_bits
    chances = [fraction_up(value, dtype) for value in values]
    counts = [-((1 - 2 * every * chance) // 2) for chance in chances]  # numbers r with r + ½ < chance·every
    for value, chance, count in zip(values, chances, counts, strict=True):
        assert abs(Fraction(count, every) - chance) <= Fraction(1, 2 * every)
        if kind is np.float32 and abs(value) >= LEAST[dtype]:
            assert Fraction(count, every) == chance
    for step, goes_up in ((-2, True), (-1, True), (0, False), (1, False)):
        numbers = [count + step for count in counts]
        known = [place for place, number in enumerate(numbers) if 0 <= number < every]
        # Counted from the least signed word.
        words = np.array([(numbers[place] << (32 - random_bits)) - (1 << 31) for place in known], np.int32)
        out = torch.empty(len(known), dtype=TORCH_DTYPES[dtype])
        _by_comparison(torch.from_numpy(values[known]), out, torch.from_numpy(words))
        _, lower, upper = neighbours(values[known], dtype)
        assert np.array_equal(out.double().abs().numpy(), upper if goes_up else lower)


@pytest.mark.parametrize("kind", COMPUTE.values())
@pytest.mark.parametrize("dtype", SMALL)
def test_a_million_roundings_of_one_value_have_its_mean(dtype: str, kind: type[Any]) -> None:
    count = 1 << 20
    for value in (0.0213, -1.003, 1.234 * LEAST[dtype] * 2.0**5, 0.37 * LEAST[dtype]):
        given = np.full(count, value, kind)
        found = widen(Raw(dtype, (count,), rounded(given, dtype, "stochastic", seed=1))).astype(np.float64)
        _, lower, upper = neighbours(given[:1], dtype)
        chance = float(fraction_up(given[0], dtype))
        deviation = (upper[0] - lower[0]) * (chance * (1 - chance) / count) ** 0.5
        assert abs(float(np.mean(found / LEAST[dtype])) - float(given[0]) / LEAST[dtype]) * LEAST[dtype] < 5 * deviation


@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_of_one_sweep_share_their_noise_with_runs_of_their_own(kernel: Kernel) -> None:
    rng = np.random.default_rng(10)
    target, plus = weights(rng, "BF16", (40_000,)), weights(rng, "F32", (40_000,), 1e-3)
    arithmetic, alphas = Arithmetic("float32", "stochastic", 5), [Weights((alpha,)) for alpha in (0.3, 0.0, 0.7, 1.0)]
    outs, _ = kernel.run(target, [(plus, None)], alphas, ["BF16"] * len(alphas), arithmetic=arithmetic, first=3)
    for out, row in zip(outs, alphas, strict=True):
        (alone,), _ = kernel.run(target, [(plus, None)], [row], ["BF16"], arithmetic=arithmetic, first=3)
        assert alone == out
    assert outs[1] == target
