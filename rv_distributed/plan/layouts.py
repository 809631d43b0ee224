"""Tensors that hold several others, and the parts that they are made of.

All experts of a layer may be one tensor, ``experts.gate_up_proj`` of [experts, gate and up rows, columns], as
transformers 5 has them in memory; gate and up, or query, key and value, may be one. A fused tensor is the rows of its
parts, one part after the other: every part is a slice of it. Names are without wrappers, as `bare_name` gives them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from rv_distributed.checkpoint.config import attention_rows
from rv_distributed.checkpoint.model import Tensor

#: `shared_experts` is another module, and not one of several experts.
_EXPERTS: Final = re.compile(r"(?P<module>(?:.+\.)?experts)\.(?P<what>gate_up_proj|down_proj)")
_LINEAR: Final = re.compile(r"(?P<module>.+)\.(?P<what>gate_up_proj|qkv_proj)\.(?P<kind>weight|bias)")
_PARTS: Final = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
#: More than any model has; a header may state any number.
_MOST_EXPERTS: Final = 1 << 14


class Part(NamedTuple):
    """A tensor that is a slice of a fused one."""

    name: str
    shape: tuple[int, ...]


def parts_of(name: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[Part, ...]:
    """What a tensor is made of, in the order of its elements; itself when it is not fused.

    ``config`` tells the sizes of query, key and value; without them, or with others, they stay as they are.
    """
    if (found := _EXPERTS.fullmatch(name)) and len(shape) == 3 and 0 not in shape and shape[0] <= _MOST_EXPERTS:
        parts = _PARTS[found["what"]]
        rows = shape[1] // len(parts)
        if rows * len(parts) == shape[1]:
            return tuple(
                Part(f"{found['module']}.{expert}.{part}.weight", (rows, shape[2]))
                for expert in range(shape[0])
                for part in parts
            )
    if (found := _LINEAR.fullmatch(name)) and shape:
        parts = _PARTS[found["what"]]
        sizes = (shape[0] // 2,) * 2 if len(parts) == 2 else attention_rows(config)
        if sizes is not None and sum(sizes) == shape[0]:
            return tuple(
                Part(f"{found['module']}.{part}.{found['kind']}", (rows, *shape[1:]))
                for part, rows in zip(parts, sizes, strict=True)
            )
    return (Part(name, shape),)


def is_transposed(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the experts in ``tensors``, one of which is ``name``, are stored as [experts, inputs, outputs].

    Llama 4 and GPT-OSS do so. The shapes of gate_up_proj and down_proj together tell: one has the outputs of the other
    as its inputs.
    """
    module = name.rpartition(".")[0]
    up, down = (tensors.get(f"{module}.{what}") for what in ("gate_up_proj", "down_proj"))
    if up is None or down is None or len(up.shape) != 3 or len(down.shape) != 3:
        return False
    return up.shape[1:] == (down.shape[2], 2 * down.shape[1])
