"""FP8 to float32 and back: every number, and every way to round between two of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp8_reference import E4M3, quantized
from reference import F32, Array, same_bits

from rv_distributed.kernels import bands, fp8

EVERY = np.arange(256, dtype=np.uint8)
NO_WORDS = np.empty(0, np.uint32)


def test_every_number_is_what_the_specification_and_torch_say() -> None:
    made = np.empty(256, np.float32)
    fp8.dequantize(EVERY, np.ones(1, np.float32), 0, 1, 256, np.array([1, 256]), made)
    theirs = torch.from_numpy(EVERY).view(torch.float8_e4m3fn).float().numpy()
    assert same_bits(made.tobytes(), E4M3.tobytes(), "F32")
    assert same_bits(made.tobytes(), theirs.tobytes(), "F32")
    assert np.signbit(made[0x80])


def encoded(values: F32) -> tuple[Array, F32]:
    """Values as E4M3 without a scale, and as they are read back."""
    made, back, one = np.empty(values.size, np.uint8), np.empty(values.size, np.float32), np.ones(1, np.float32)
    fp8.quantize(values, one, one, values.size, values.size, NO_WORDS, made, back)
    return made, back


def test_rounding_is_to_nearest_even_and_ends_at_448() -> None:
    finite = np.sort(E4M3[np.isfinite(E4M3)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    random = (np.random.default_rng(1).standard_normal(20_000) * 100).astype(np.float32)
    tiny = np.array([0.0, -0.0, 1e-40, 2.0**-10, -(2.0**-10), 1.5 * 2.0**-9, 448, 464, 1e30], np.float32)
    values = np.clip(np.concatenate([finite, middles, *around, random, tiny]), -448, 448)
    made, back = encoded(values)
    theirs = torch.from_numpy(values).to(torch.float8_e4m3fn)
    assert np.array_equal(made, theirs.view(torch.uint8).numpy())
    assert np.array_equal(back, theirs.float().numpy())
    beyond = np.array([449, 480, 1e38, -1e38, np.inf, -np.inf, np.nan], np.float32)
    assert encoded(beyond)[0].tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0xFF, 0x7F]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0"])
@pytest.mark.parametrize("size", [1e-35, 1e-29, 1e-3, 1.0, 1e4, 1e30])
def test_scales_of_any_size_keep_numbers_in_range(dtype: str, size: float) -> None:
    """Read back, nothing is off by more than half a step of E4M3, of the block's own size."""
    rng = np.random.default_rng(4)
    values = (rng.standard_normal(128 * 256) * size).astype(np.float32)
    band = bands.quantize(values, 256, 128, dtype, False, NO_WORDS)
    weight, scales = quantized(values, (128, 256), dtype, powers=dtype == "F8_E8M0")
    assert (band.elements.tobytes(), band.scales) == (weight.data, scales.data)
    error = np.abs(band.back.astype(np.float64) - values)
    if size > 1e-30:
        largest = np.abs(values.reshape(128, 2, 128)).max(axis=(0, 2)).repeat(128)[None].repeat(128, 0).reshape(-1)
        step = 2.0 if dtype == "F8_E8M0" else 1.01
        assert np.all(error <= np.maximum(np.abs(values) / 16, largest / 448 * 2.0**-10) * step)
    else:
        assert not band.back.any()


def test_by_chance_only_neighbours_come_out_and_their_mean_is_right() -> None:
    values = np.repeat(np.array([0.3, 17.3, -100.1, 0.001, 447.9, 0.0], np.float32), 40_000)
    words = np.random.default_rng(8).integers(0, 2**32, values.size, dtype=np.uint32)
    made, back, one = np.empty(values.size, np.uint8), np.empty(values.size, np.float32), np.ones(1, np.float32)
    fp8.quantize(values, one, one, values.size, values.size, words, made, back)
    for number, each in enumerate(back.reshape(6, -1)):
        value = float(values[number * 40_000])
        found = np.unique(each)
        finite = np.sort(E4M3[np.isfinite(E4M3)]).astype(np.float64)
        place = np.searchsorted(finite, value)
        low, high = (value, value) if value == 0 else (finite[place - 1], finite[place])
        assert set(found.tolist()) == {low, high}
        assert abs(each.mean(dtype=np.float64) - value) <= 5 * (high - low) / 2 / 200


@pytest.mark.parametrize("block", [(128, 128), (3, 5), (1, 32), (200, 1)])
def test_any_range_of_a_stack_of_matrices_has_its_scales(block: tuple[int, int]) -> None:
    rng, rows, columns = np.random.default_rng(2), 70, 33
    raw = rng.integers(0, 120, 3 * rows * columns, dtype=np.uint8)
    down, across = -(-rows // block[0]), -(-columns // block[1])
    scales = rng.random((3, down, across)).astype(np.float32)
    expanded = scales.repeat(block[0], 1)[:, :rows].repeat(block[1], 2)[:, :, :columns].reshape(-1)
    wanted = E4M3[raw] * expanded
    for _ in range(200):
        first, last = sorted(rng.integers(0, raw.size + 1, 2).tolist())
        if first == last:
            continue
        top = first // columns // rows * down + first // columns % rows // block[0]
        made = np.empty(last - first, np.float32)
        rest = scales.reshape(-1, across)[top:].reshape(-1).copy()
        fp8.dequantize(raw[first:last], rest, first, rows, columns, np.array(block), made)
        assert np.array_equal(made, wanted[first:last])
    assert same_bits(widen_all(raw).tobytes(), E4M3[raw].tobytes(), "F32")


def widen_all(raw: Array) -> F32:
    made = np.empty(raw.size, np.float32)
    fp8.dequantize(raw, np.ones(1, np.float32), 0, 1, raw.size, np.array([1, raw.size]), made)
    return made
