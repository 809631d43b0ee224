"""Which of a target's tensors are written as FP8 again, and how: those that it has in FP8 itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rv_distributed.checkpoint.fp8 import FP8, SCALES, fp8_scheme
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.errors import Problem
from rv_distributed.plan.model import Requantized, ShardPlan, TensorPlan

#: In which scales can be written; those of float16 would be too coarse.
_SCALE_DTYPES: Final = ("F32", "BF16", "F8_E8M0")
_WITHOUT: Final = "Leave out --requantize: the output is in bfloat16 then."


def requantized_tensors(target: Checkpoint) -> tuple[dict[str, Requantized], list[Problem]]:
    """How each FP8 tensor of the target, as it is stored, is written again; and why not."""
    scheme = fp8_scheme(target.config)
    if scheme is None or FP8 not in target.dtypes:
        return {}, [
            Problem(target.uri, "has no FP8 weights with scales, which --requantize writes", "Leave out --requantize.")
        ]
    if scheme.block is None:
        what = "has one scale for each tensor, which --requantize does not write: it would take all of it at once"
        return {}, [Problem(target.uri, what, _WITHOUT)]
    found = {}
    problems = []
    for name, tensor in target.tensors.items():
        scales = target.tensors.get(name + SCALES)
        if tensor.dtype != FP8 or scales is None:
            continue
        if scales.dtype not in _SCALE_DTYPES:
            what = f"has scales in {scales.dtype}; --requantize writes {', '.join(_SCALE_DTYPES)}"
            problems.append(Problem(target.uri, what, _WITHOUT, name))
        rows, columns = (1, *tensor.shape)[-2:]
        found[name] = Requantized(rows, columns, scheme.block, scales.dtype, scheme.are_powers_of_2)
    return found, problems


def is_of_scales(shard: ShardPlan, tensors: Sequence[TensorPlan]) -> bool:
    """Whether a shard holds the scales of requantized tensors, which nothing else does."""
    return shard.length > 0 and tensors[shard.first].rule == "scale"


def with_places(tensors: Iterable[TensorPlan], shard_names: Iterable[str]) -> tuple[TensorPlan, ...]:
    """Tensors of a plan, with the places of their scales in those that have some."""
    tensors, names = tuple(tensors), tuple(shard_names)
    places = {tensor.name: (number, names[tensor.shard], tensor.start) for number, tensor in enumerate(tensors)}

    def placed(tensor: TensorPlan) -> TensorPlan:
        if tensor.requantized is None:
            return tensor
        name = tensor.name + SCALES
        scales, shard, at = places[name]
        how = tensor.requantized._replace(scales=scales, scales_name=name, scales_shard=shard, scales_at=at)
        return tensor._replace(requantized=how)

    return tuple(map(placed, tensors))
