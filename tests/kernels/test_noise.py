"""The random bits: the reference's, the same however they are asked for, uniform, and without visible patterns."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from rounding_reference import noise16, noise32

from rv_distributed.kernels.noise import Noise

MANY = 1 << 20
CPU = torch.device("cpu")
#: How many standard deviations a statistic may be off: by chance, one in ten million is.
SIGMAS = 5.3
Words = npt.NDArray[np.uint32]


def words(seed: int, name: str, first: int, count: int, device: torch.device = CPU) -> Words:
    return Noise(seed, words=count, device=device).bits32(name, first, count).cpu().numpy().view(np.uint32)


def halves(seed: int, name: str, first: int, count: int) -> npt.NDArray[np.uint16]:
    return Noise(seed, words=count, device=CPU).bits16(name, first, count).numpy().view(np.uint16)


@pytest.mark.parametrize("first", [0, 1, 12345, (1 << 32) - 1000, 1 << 32, (7 << 32) - 1, (1 << 33) + 5])
@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_the_bits_are_the_reference_s(seed: int, first: int) -> None:
    for name in ("model.norm.weight", "", "ein Name mit ü"):
        assert np.array_equal(words(seed, name, first, 5000), noise32(seed, name, first, 5000))
        assert np.array_equal(halves(seed, name, first, 5000), noise16(seed, name, first, 5000))


@pytest.mark.parametrize("cut", [1, 2, 999, 1000, 4097])
def test_an_element_has_its_bits_whatever_is_asked_for_with_it(cut: int) -> None:
    noise, first = Noise(3, words=6000, device=CPU), (1 << 32) - 2001
    whole16, whole32 = (get("x", first, 6000).clone() for get in (noise.bits16, noise.bits32))
    for get, whole in ((noise.bits16, whole16), (noise.bits32, whole32)):
        parts = [get("x", first + at, min(cut, 6000 - at)).clone() for at in range(0, 6000, cut)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.gpu
def test_a_gpu_makes_the_bits_of_the_cpu() -> None:
    first = (1 << 32) - 2001
    assert np.array_equal(words(3, "x", first, MANY, torch.device("cuda")), words(3, "x", first, MANY))


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(shift: int) -> None:
    counts = np.bincount(words(1, "x", 0, MANY) >> shift & 0xFF, minlength=256)
    expected = MANY / 256
    chi_squared = float(np.sum((counts - expected) ** 2) / expected)
    assert abs(chi_squared - 255) < SIGMAS * math.sqrt(2 * 255)


def test_the_sixteen_bits_are_uniform_to_the_last() -> None:
    counts = np.bincount(halves(1, "x", 0, MANY), minlength=1 << 16)
    chi_squared = float(np.sum((counts - 16) ** 2) / 16)
    assert abs(chi_squared - 65535) < SIGMAS * math.sqrt(2 * 65535)


def bits_of(values: Words, width: int) -> npt.NDArray[np.float32]:
    """One row a bit, with −1 for 0."""
    return (values[None, :] >> np.arange(width, dtype=np.uint32)[:, None] & 1).astype(np.float32) * 2 - 1


def assert_no_bit_tells_another(one: Words, other: Words, width: int = 32) -> None:
    """All pairs of a bit here and a bit there, and the values themselves."""
    products = bits_of(one, width) @ bits_of(other, width).T / math.sqrt(one.size)
    assert np.max(np.abs(products)) < SIGMAS
    centred = [values / 2.0**width - 0.5 for values in (one, other)]
    assert abs(np.sum(centred[0] * centred[1]) * 12 / math.sqrt(one.size)) < SIGMAS


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64, 1024, 4096, 1 << 16])
def test_neighbours_know_nothing_of_each_other(lag: int) -> None:
    values = words(1, "x", 0, MANY // 4 + lag)
    assert_no_bit_tells_another(values[:-lag], values[lag:])


def test_the_two_halves_of_a_word_know_nothing_of_each_other() -> None:
    values = halves(1, "x", 0, MANY // 2).astype(np.uint32)
    assert_no_bit_tells_another(values[::2], values[1::2], 16)


def test_tensors_and_seeds_know_nothing_of_each_other() -> None:
    sources = [(0, "layers.0.up"), (0, "layers.1.up"), (0, "layers.0.down"), (1, "layers.0.up"), (1 << 63, "a")]
    made = [words(seed, name, 0, MANY // 4) for seed, name in sources]
    made.append(words(0, "layers.0.up", 1 << 32, MANY // 4))
    for one, other in combinations(made, 2):
        assert_no_bit_tells_another(one, other)


def test_two_tensors_do_not_draw_on_one_sequence() -> None:
    """A word that both have is followed by another one in each."""
    one, other = (words(0, name, 0, 1 << 22) for name in ("a", "b"))
    _, here, there = np.intersect1d(one[:-1], other[:-1], return_indices=True)
    assert here.size > 1000, "the case has nothing in common"
    assert np.mean(one[here + 1] == other[there + 1]) < 0.01
