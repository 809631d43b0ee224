"""Vectors that are added to each other first, and sums of models: both kernels, against NumPy, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from kernel_runners import DEFAULT, HERE, ByTorch, Kernel, Made, Vectors
from mergekit_reference import as_raw, linear, total
from reference import Raw, same_bits, weights, widen

from rv_distributed.recipe import Order, Weights

COUNT = 5003
both = pytest.mark.parametrize("kernel", HERE.values(), ids=HERE)


def run(
    kernel: Kernel, target: Raw | None, vectors: Vectors, rows: Sequence[Weights], dtype: str, order: Order
) -> Made:
    arithmetic = DEFAULT._replace(order=order)
    return kernel.run(target, vectors, rows, [dtype] * len(rows), arithmetic=arithmetic, weighted=True)


def raws(dtypes: Sequence[str]) -> list[Raw]:
    rng = np.random.default_rng(len(dtypes))
    return [weights(rng, dtype, (COUNT,), 1.0) for dtype in dtypes]


@both
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("normalize", [False, True])
def test_models_are_summed_as_mergekit_sums_them(kernel: Kernel, dtype: str, normalize: bool) -> None:
    models = raws(["F32", "BF16", "F16", "F32"])
    numbers = [(0.3, 0.7, -1.1, 0.2), (1.0, 1.0, -1.0, 0.0), (0.1, 0.1, 0.1, 0.1)]
    rows = []
    for alphas in numbers:
        singles = tuple(float(np.float32(alpha)) for alpha in alphas)
        divisor = float(total(singles))
        rows.append(Weights(singles, divisor if normalize else 1.0))
    found, _ = run(kernel, None, [(model, None) for model in models], rows, dtype, "fused")
    for raw, row in zip(found, rows, strict=True):
        wanted = linear(models, row.alphas, normalize=False) / np.float32(row.divisor)
        assert same_bits(raw.data, as_raw(wanted, models[0], dtype).data, dtype)


@both
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_vectors_are_added_up_before_the_target_is(kernel: Kernel, dtype: str) -> None:
    target, *models = raws(["BF16", "F32", "BF16", "BF16"])
    rows = []
    for alphas, divisor, scale in [((0.3, 0.4, -0.2), 0.5, 0.8), ((0.0, 0.0, 1.0), 1.0, 1.0), ((0.0,) * 3, 1.0, 2.0)]:
        singles = tuple(float(np.float32(alpha)) for alpha in alphas)
        rows.append(Weights(singles, divisor, float(np.float32(scale))))
    found, _ = run(kernel, target, [(model, target) for model in models], rows, dtype, "sum")
    for raw, row in zip(found, rows, strict=True):
        mixed = np.zeros(COUNT, np.float32)
        for model, alpha in zip(models, row.alphas, strict=True):
            mixed = mixed + np.float32(alpha) * (widen(model) - widen(target))
        wanted = widen(target) + mixed / np.float32(row.divisor) * np.float32(row.scale)
        if not row.moves and dtype == target.dtype:
            assert raw.data == target.data
        else:
            assert same_bits(raw.data, as_raw(wanted, target, dtype).data, dtype)


@pytest.mark.parametrize(("has_target", "order"), [(False, "fused"), (True, "sum")])
def test_both_kernels_measure_the_same(has_target: bool, order: Order) -> None:
    """Of a sum of models v is the sum itself, and of vectors what was added."""
    target, *models = raws(["F32", "F32", "BF16"])
    rows = [Weights((0.5, 0.25), 0.75, 1.5)]
    vectors = [(model, None) for model in models]
    (one,), (other,) = (
        run(kernel, target if has_target else None, vectors, rows, "BF16", order)[1] for kernel in HERE.values()
    )
    assert (one.nonzero, one.changed, one.ulps, one.absorbed) == (
        other.nonzero,
        other.changed,
        other.ulps,
        other.absorbed,
    )
    assert (one.v_sq, one.t_sq) == pytest.approx((other.v_sq, other.t_sq), rel=1e-12)
    assert (one.moved_v, one.error_sq) == pytest.approx((other.moved_v, other.error_sq), rel=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize(("has_target", "order"), [(False, "fused"), (True, "sum")])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_gpu_makes_the_bits_of_the_cpu(has_target: bool, order: Order, dtype: str) -> None:
    target, *models = raws(["F32", "F32", "BF16", "F16"])
    third, less, more, divisor, scale = (float(np.float32(value)) for value in (0.3, -0.7, 1.1, 0.7, 1.3))
    rows = [Weights((third, less, more), divisor, scale), Weights((1.0, 0.0, -1.0))]
    vectors = [(model, target if has_target else None) for model in models]
    args = (target if has_target else None, vectors, rows, dtype, order)
    assert all(run(kernel, *args)[0] == run(ByTorch("cuda"), *args)[0] for kernel in HERE.values())
