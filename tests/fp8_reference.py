"""FP8 checkpoints and what they mean, in NumPy: from the OCP's specification of E4M3 and E8M0 alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from reference import F32, ITEM_BYTES, Raw, Tensors, narrow, write_checkpoint

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
