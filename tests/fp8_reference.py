"""FP8 checkpoints and what they mean, in NumPy: from the OCP's specification of E4M3 and E8M0 alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from reference import F32, ITEM_BYTES, Raw, Tensors, narrow, widen, write_checkpoint

ITEM_BYTES.update({"F8_E8M0": 1})
BLOCK = (128, 128)


def _e4m3(bits: int) -> float:
    exponent, mantissa = bits >> 3 & 15, bits & 7
    if bits & 0x7F == 0x7F:
        return math.nan
    size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
    return -size if bits >> 7 else size


#: All numbers of E4M3, by their bits.
E4M3: F32 = np.array([_e4m3(bits) for bits in range(256)], np.float32)


def scales_of(raw: Raw) -> F32:
    """Scales in float32."""
    bits = np.frombuffer(raw.data, np.uint8)
    if raw.dtype == "F8_E8M0":
        with np.errstate(over="ignore"):
            powers = np.ldexp(1.0, bits.astype(np.int64) - 127)
        return np.where(bits == 255, np.nan, powers).astype(np.float32)
    if raw.dtype == "BF16":
        return (np.frombuffer(raw.data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw.data, np.float32)


def dequantized(weight: Raw, scales: Raw, block: tuple[int, int] = BLOCK) -> Raw:
    """``q·s``, rounded to float32 once."""
    rows, columns = weight.shape[-2:]
    values = E4M3[np.frombuffer(weight.data, np.uint8)].reshape(-1, rows, columns)
    down, across = -(-rows // block[0]), -(-columns // block[1])
    grid = scales_of(scales).reshape(-1, down, across)
    for_each = grid.repeat(block[0], axis=1)[:, :rows].repeat(block[1], axis=2)[:, :, :columns]
    with np.errstate(all="ignore"):
        return Raw("F32", weight.shape, (values * for_each).astype(np.float32).tobytes())


def random_fp8(
    rng: np.random.Generator, shape: tuple[int, ...], scale_dtype: str = "F32", block: tuple[int, int] = BLOCK
) -> tuple[Raw, Raw]:
    """A weight and its scales: every number of E4M3, and scales such that the weights are small."""
    bits = rng.integers(0, 256, math.prod(shape), dtype=np.uint8)
    bits[bits & 0x7F == 0x7F] = 0x30
    grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    sizes = (rng.random(math.prod(grid)) * 1e-3 + 1e-5).astype(np.float32)
    if scale_dtype == "F8_E8M0":
        raw = Raw(scale_dtype, grid, rng.integers(110, 120, sizes.size, dtype=np.uint8).tobytes())
    else:
        raw = Raw(scale_dtype, grid, narrow(sizes, scale_dtype))
    return Raw("F8_E4M3", shape, bits.tobytes()), raw


def fp8_config(block: tuple[int, int] | None = BLOCK, **more: object) -> dict[str, Any]:
    """A ``quantization_config`` as DeepSeek writes it."""
    size = list(block) if block else None
    stated = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": size}
    return {"quantization_config": {**stated, **more}}


def write_fp8(folder: Path, tensors: Tensors, config: Mapping[str, object], **more: Any) -> str:
    """A checkpoint whose config.json is ``config``."""
    text = json.dumps({"model_type": "llama", "torch_dtype": "bfloat16", **config}, indent=2).encode()
    return write_checkpoint(folder, tensors, sidecars={"config.json": text}, **more)


#: The finite numbers of E4M3 that are not negative, in order: their places are their bits.
_SIZES = E4M3[:127].astype(np.float64)


def quantized(
    values: F32,
    shape: tuple[int, ...],
    scale_dtype: str = "F32",
    *,
    powers: bool = False,
    block: tuple[int, int] = BLOCK,
    uniform: npt.NDArray[np.float64] | None = None,
) -> tuple[Raw, Raw]:
    """A weight and its scales, with a loop over blocks: as the README states it.

    ``uniform`` are the random numbers of stochastic rounding, between 0 and 1.
    """
    rows, columns = shape[-2:]
    stack = values.reshape(-1, rows, columns)
    drawn = None if uniform is None else uniform.reshape(stack.shape)
    bits = np.empty(stack.shape, np.uint8)
    scales: list[np.float32] = []
    one = np.float32(1)
    for matrix in range(len(stack)):
        for top in range(0, rows, block[0]):
            for left in range(0, columns, block[1]):
                part = (matrix, slice(top, top + block[0]), slice(left, left + block[1]))
                found = stack[part]
                finite = np.abs(found[np.isfinite(found)])
                most = finite.max() if finite.size else np.float32(0)
                forward = np.float32(448) / most if most > 2.0**-100 else one
                scale = one / forward
                if powers:
                    scale = np.float32(2.0 ** math.ceil(math.log2(scale)))
                    forward = one / scale
                if scale_dtype == "BF16":
                    scale = widen(Raw("BF16", (), narrow(np.array([scale]), "BF16")))[0]
                    forward = one / scale
                scales.append(scale)
                bits[part] = _nearest(found * forward, None if drawn is None else drawn[part])
    grid = (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if scale_dtype == "F8_E8M0":
        stored = np.array([round(math.log2(scale)) + 127 for scale in scales], np.uint8).tobytes()
    else:
        stored = narrow(np.array(scales, np.float32), scale_dtype)
    return Raw("F8_E4M3", shape, bits.tobytes()), Raw(scale_dtype, grid, stored)


def _nearest(values: F32, uniform: npt.NDArray[np.float64] | None) -> npt.NDArray[np.uint8]:
    """The bits of the nearest numbers, of the even one of two; or of one of two neighbours, as the fraction says."""
    sizes = np.abs(values.astype(np.float64))
    below = np.clip(np.searchsorted(_SIZES, sizes, side="right") - 1, 0, 125)
    low, high = _SIZES[below], _SIZES[below + 1]
    with np.errstate(invalid="ignore"):
        fraction = (sizes - low) / (high - low)
    odd = below % 2 == 1
    up = (fraction > 0.5) | ((fraction == 0.5) & odd)
    if uniform is not None:
        up = np.where(sizes < 448, fraction > uniform, up)
    bits = np.where(np.isfinite(values), below + up, 127).astype(np.uint8)
    found: npt.NDArray[np.uint8] = bits | np.where(np.signbit(values), 0x80, 0).astype(np.uint8)
    return found
