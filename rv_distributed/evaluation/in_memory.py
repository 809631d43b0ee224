"""Moving a loaded model along the vector, to the bits that ``rv apply`` would have written.

The pieces of the plan are computed as a worker computes them, from the checkpoints' files, and go into the model's
parameters instead of a shard. Each move starts from the target's file, so that nothing of the move before it is left,
and no second copy of the weights is held: alpha 0 gives back the target's own bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from rv_distributed.errors import InputError, Problem
from rv_distributed.plan import Plan, Span, task_of
from rv_distributed.recipe import Weights
from rv_distributed.reduce import check_unchanged
from rv_distributed.runtime.buffers import Bytes
from rv_distributed.runtime.dry import DryStream, dry_config
from rv_distributed.runtime.model import MOST_REQUESTS

if TYPE_CHECKING:
    from torch import Tensor

_REMEDY: Final = "Leave out --in-memory: then the models are written, and loaded as any other."
#: In which tensors can be moved, with torch's names for them.
_DTYPES: Final = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Mover:
    """Sets the weights of one loaded model."""

    def __init__(self, model: Any, plan: Plan) -> None:
        """``model`` is a module of transformers, loaded from the plan's target.

        Raises InputError when its parameters are not the checkpoint's tensors, name by name.
        """
        self._plan = plan
        self._places: dict[str, Tensor] = model.state_dict()
        problems = _problems(plan, self._places)
        if problems:
            raise InputError(problems)

    def move(self, alphas: tuple[float, ...]) -> None:
        """Make the model ``target + Σ αₖ·vₖ``, or the target where all alphas are 0.

        Raises PieceError when a source cannot be read, ChangedError when it is not what was planned with.
        """
        import torch

        wanted = {tensor.name: tensor for tensor in self._plan.tensors if tensor.rule == "combine"}
        whole: dict[str, Bytes] = {}
        with torch.no_grad():
            for part in _computed(self._plan, alphas):
                tensor = wanted[part.name]
                size = tensor.stop - tensor.start
                # Of a model on another device, or in another dtype than its file: transformers casts there, too.
                raw = whole.setdefault(part.name, np.empty(size, np.uint8))
                raw[part.start : part.start + len(part.made)] = part.made
                if part.start + len(part.made) == size:
                    values = torch.from_numpy(whole.pop(part.name)).view(getattr(torch, _DTYPES[tensor.dtype]))
                    self._places[part.name].copy_(values.view(tensor.shape))
        check_unchanged(self._plan)


class _Part(NamedTuple):
    name: str
    start: int
    """Counted in the tensor, in bytes."""
    made: Bytes
    """Valid until the next one."""


def _computed(plan: Plan, alphas: tuple[float, ...]) -> Iterator[_Part]:
    """The bytes of all tensors that get vectors, each tensor's in their order."""
    plan = replace(plan, alphas=(alphas,))
    stop = threading.Event()
    with ThreadPoolExecutor(MOST_REQUESTS, "rv-fetch") as fetching, ExitStack() as at_the_end:
        at_the_end.callback(stop.set)
        stream = DryStream(dry_config(plan, output="", stats="none"), fetching, stop)
        for task in (task_of(plan, piece) for piece in plan.pieces):
            task = task._replace(spans=tuple(_weighed(span, alphas) for span in task.spans if span.rule == "combine"))
            for chunk, made, *_, names in stream.chunks(task):
                for part, name in zip(chunk.parts, names, strict=True):
                    span = task.spans[part.span]
                    start = span.start + chunk.start + part.at - span.at
                    yield _Part(name, start, made[part.at : part.at + part.nbytes])


def _weighed(span: Span, alphas: tuple[float, ...]) -> Span:
    """The span with the alphas in place of the plan's own, of the vectors that its tensor gets."""
    return span._replace(weights=(Weights(tuple(alphas[one.vector] for one in span.vectors)),))


def _problems(plan: Plan, places: Mapping[str, Tensor]) -> list[Problem]:
    """Where the loaded model is not its checkpoint, tensor by tensor."""
    where = plan.inputs[0].uri
    tensors = {tensor.name: tensor for tensor in plan.tensors}
    problems = []
    for name, tensor in tensors.items():
        if tensor.rule == "combine" and name not in places:
            problems.append(
                Problem(where, "gets the vector, but the loaded model has no such parameter", _REMEDY, name)
            )
        elif tensor.rule == "combine" and tuple(places[name].shape) != tensor.shape:
            what = f"has shape {list(tensor.shape)}, but {list(places[name].shape)} in the loaded model"
            problems.append(Problem(where, what, _REMEDY, name))
        elif tensor.rule == "combine" and tensor.dtype not in _DTYPES:
            problems.append(Problem(where, f"is {tensor.dtype}, which is not moved in memory", _REMEDY, name))
    by_memory: dict[int, list[str]] = {}
    for name, value in places.items():
        by_memory.setdefault(value.data_ptr(), []).append(name)
    for names in by_memory.values():
        own = [name for name in names if name in tensors]
        if not own and places[names[0]].numel():
            what = "is a parameter of the loaded model, but no tensor of the checkpoint"
            problems.append(Problem(where, what, _REMEDY, names[0]))
        elif len(own) > 1 and any(tensors[name].rule == "combine" for name in own):
            what = f"is one parameter of the loaded model with {own[0]}, but a tensor of its own in the checkpoint"
            problems.append(Problem(where, what, _REMEDY, own[1]))
    return problems
