"""Which of a target's tensors are written as FP8 again, and how: those that it has in FP8 itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from rv_distributed.checkpoint.dtypes import WIDE
from rv_distributed.checkpoint.fp8 import FP8, SCALES, fp8_scheme
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import BlockScaled
from rv_distributed.errors import Problem
from rv_distributed.plan.model import Requantized, Rule, Segment, ShardPlan, TensorPlan
from rv_distributed.recipe import Weights

#: In which scales can be written; those of float16 would be too coarse.
_SCALE_DTYPES: Final = ("F32", "BF16", "F8_E8M0")
_WITHOUT: Final = "Leave out --requantize: the output is in bfloat16 then."


class Draft(NamedTuple):
    """A tensor of the output that has no place yet; see `TensorPlan`. Its segments' ends are counted in elements."""

    name: str
    tensor: Tensor
    """Of the frame."""
    rule: Rule
    dtype: str
    segments: tuple[Segment, ...]
    why: str
    matched: str = ""
    requantized: Requantized | None = None


def requantized(
    drafts: Iterable[Draft], target: Checkpoint, unweighted: tuple[Weights, ...]
) -> tuple[list[Draft], list[Draft], list[Problem]]:
    """The drafts with those of FP8 tensors written as such again, and the drafts of their new scales; what is not
    changed is copied with the scales that it has. Also returns what keeps tensors from that.

    ``target`` is the frame as it is stored, ``unweighted`` are the weights of no vectors.
    """
    again, problems = requantized_tensors(target)
    found: list[Draft] = []
    scales: list[Draft] = []
    for draft in drafts:
        how, name = again.get(draft.name), draft.name + SCALES
        if how is None:
            found.append(draft)
        elif draft.rule != "combine" and isinstance(draft.tensor.source, BlockScaled):
            found += [_copy(target, stored, draft.why, unweighted) for stored in (draft.name, name)]
        else:
            problems += _odd_segments(target, draft, how)
            found.append(draft._replace(dtype=FP8, requantized=how))
            of_scales = target.tensors[name]
            scales.append(Draft(name, of_scales, "scale", of_scales.dtype, (), "scales of requantized weights"))
    rest = target.tensors.keys() - {draft.name for draft in (*found, *scales)}
    why = "of quantized activations"
    found += [_copy(target, name, why, unweighted) for name in target.tensors if name in rest]
    return found, scales, problems


def _copy(target: Checkpoint, name: str, why: str, unweighted: tuple[Weights, ...]) -> Draft:
    tensor = target.tensors[name]
    segment = Segment(tensor.elements, target.source(tensor), (), unweighted)
    return Draft(name, tensor, "copy", tensor.dtype, (segment,), why)


def _odd_segments(target: Checkpoint, draft: Draft, how: Requantized) -> list[Problem]:
    """Why parts of a tensor cannot be made one band after the other."""
    if any(how.band(segment.stop)[0] != segment.stop for segment in draft.segments[:-1]):
        what = f"gets its vector in parts, one of which ends within a block of {how.block[0]} rows"
        return [Problem(target.uri, what, _WITHOUT, draft.name)]
    if any(source.dtype == WIDE for segment in draft.segments for source in segment.sources):
        return [
            Problem(target.uri, f"is {WIDE} in an input, which --requantize does not compute", _WITHOUT, draft.name)
        ]
    return []


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
