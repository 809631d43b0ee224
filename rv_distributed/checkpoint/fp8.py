"""FP8 checkpoints with a scale for each block of a weight, as DeepSeek-V3 introduced them: ``NAME`` in F8_E4M3,
``NAME_scale_inv`` to multiply its blocks by, and the size of a block in config.json.

Their other names and forms: Qwen3's scales are BF16 and not F32; those of DeepSeek-V3.1 are powers of 2 (``scale_fmt``
``ue8m0``), and may be stored as F8_E8M0; without a block size there is one scale for the whole tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import BlockScaled
from rv_distributed.errors import Problem

FP8: Final = "F8_E4M3"
#: What the name of a weight's scales has behind the weight's own.
SCALES: Final = "_scale_inv"
_SCALE_DTYPES: Final = ("F32", "BF16", "F16", "F8_E8M0")
_ACTIVATION_SCALES: Final = ("activation_scale", ".input_scale")
_DOWNLOAD_AGAIN: Final = "Download the checkpoint again: its scales do not fit its weights."


class Fp8Scheme(NamedTuple):
    """What config.json says of FP8 weights."""

    block: tuple[int, int] | None
    """Rows and columns of a block; None for one scale a tensor."""
    are_powers_of_2: bool
    """Whether scales are to be powers of 2."""

    def __str__(self) -> str:
        return f"fp8 {self.block[0]}×{self.block[1]} blocks" if self.block else "fp8 with a scale for each tensor"


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``quantization_config`` of a config.json, or of the language model in it; empty without one."""
    text = config.get("text_config")
    stated = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    return stated if isinstance(stated, dict) else {}


def fp8_scheme(config: Mapping[str, Any]) -> Fp8Scheme | None:
    """What a config.json says of FP8 weights; None when it does not say that there are any that we read."""
    stated = quantization_of(config)
    if stated.get("quant_method") != "fp8" or stated.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return None
    are_powers_of_2 = stated.get("scale_fmt") == "ue8m0"
    block = stated.get("weight_block_size", ())
    if block is None:
        return Fp8Scheme(None, are_powers_of_2)
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_size, block)):
        return None
    return Fp8Scheme((block[0], block[1]), are_powers_of_2)


def _is_size(size: object) -> bool:
    return type(size) is int and 0 < size < 1 << 31


def dequantized(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], list[Problem]]:
    """The tensors of a checkpoint with FP8 weights as they are to be read: in float32, and as BF16 where they are
    written. Their scales are no tensors any more. Also returns what is wrong with them."""
    scheme = fp8_scheme(checkpoint.config)
    if scheme is None:
        return dict(checkpoint.tensors), []
    found: dict[str, Tensor] = {}
    problems = []
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(SCALES):
            if name.removesuffix(SCALES) not in checkpoint.tensors:
                what = f"are scales of {name.removesuffix(SCALES)}, which is missing"
                problems.append(Problem(checkpoint.uri, what, _DOWNLOAD_AGAIN, name))
        elif name.endswith(_ACTIVATION_SCALES):
            continue
        elif name + SCALES in checkpoint.tensors or tensor.dtype == FP8:
            source = _block_scaled(checkpoint, name, scheme)
            if isinstance(source, Problem):
                problems.append(source)
            # What cannot be read is there all the same, so that nobody says it is missing.
            found[name] = tensor._replace(dtype="BF16", source=None if isinstance(source, Problem) else source)
        else:
            found[name] = tensor
    return found, problems


def _block_scaled(checkpoint: Checkpoint, name: str, scheme: Fp8Scheme) -> BlockScaled | Problem:
    weight, scales = checkpoint.tensors[name], checkpoint.tensors.get(name + SCALES)
    if scales is None:
        return Problem(checkpoint.uri, f"is {FP8} and has no scales, {name + SCALES}", _DOWNLOAD_AGAIN, name)
    if weight.dtype != FP8 or scales.dtype not in _SCALE_DTYPES:
        what = f"is {weight.dtype} with scales in {scales.dtype}; read are {FP8} with {', '.join(_SCALE_DTYPES)}"
        return Problem(checkpoint.uri, what, "Give the model that it was made from, or dequantize it first.", name)
    if weight.source is not None or scales.source is not None:
        what = "is FP8 and lies in several parts, which is read of safetensors only"
        return Problem(checkpoint.uri, what, "Save the model as safetensors first.", name)
    columns = weight.shape[-1] if weight.shape else 1
    is_one_block = scheme.block is None and scales.elements == 1
    rows = weight.elements // max(1, columns) if is_one_block else (1, *weight.shape[:-1])[-1]
    high, wide = scheme.block or (max(1, rows), max(1, columns))
    expected = scales.shape if is_one_block else (*weight.shape[:-2], -(-rows // high), -(-columns // wide))
    if scales.shape != expected:
        what = f"has shape {list(weight.shape)} and scales of shape {list(scales.shape)}, not {list(expected)}"
        return Problem(checkpoint.uri, f"{what} for blocks of {high}×{wide}", _DOWNLOAD_AGAIN, name)
    return BlockScaled(checkpoint.stored(weight), checkpoint.stored(scales), rows, columns, (high, wide))
