"""mergekit 0.1.5's arithmetic in NumPy, read from its source and held against its own output by `test_mergekit`.

``linear`` adds with fused multiply-adds (torch's addcmul_ on x86 with AVX2). ``task_arithmetic`` rounds every product
and adds the deltas up before the base.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from reference import F32, Raw, narrow, widen


def fused(acc: F32, weight: np.float32, values: F32) -> F32:
    """``acc + weight·values``, rounded once: float64 holds the product."""
    return (acc.astype(np.float64) + np.float64(weight) * values.astype(np.float64)).astype(np.float32)


def total(weights: Sequence[float]) -> np.float32:
    """Their sum in float32."""
    found = np.float32(0)
    for weight in weights:
        found = np.float32(found + np.float32(weight))
    return found


def linear(models: Sequence[Raw], weights: Sequence[float], *, normalize: bool) -> F32:
    result = np.zeros((models[0].shape and int(np.prod(models[0].shape))) or 1, np.float32)
    for model, weight in zip(models, weights, strict=True):
        result = fused(result, np.float32(weight), widen(model))
    return result / total(weights) if normalize else result


def task_arithmetic(
    base: Raw, models: Sequence[Raw], weights: Sequence[float], *, normalize: bool = False, scale: float = 1.0
) -> F32:
    mixed = np.zeros_like(widen(base))
    for model, weight in zip(models, weights, strict=True):
        mixed = mixed + np.float32(weight) * (widen(model) - widen(base))
    divisor = total(weights)
    if normalize:
        mixed = mixed / (divisor if abs(divisor) >= 1e-8 else np.float32(1))
    if scale != 1.0:
        mixed = mixed * np.float32(scale)
    return widen(base) + mixed


def as_raw(values: F32, like: Raw, dtype: str) -> Raw:
    return Raw(dtype, like.shape, narrow(values, dtype))
