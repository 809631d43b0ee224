"""From a recipe and its opened checkpoints to a plan: match tensors, choose rules and dtypes, lay out.

The frame (the target, or the donor when a vector is extracted) gives names, shapes, order and, with
``dtype="auto"``, the dtype of every output tensor. All problems are found before any is raised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, get_args

from rv_distributed.checkpoint.dtypes import ARITHMETIC, DTYPES, FROM_USER
from rv_distributed.checkpoint.fp8 import FP8, SCALES
from rv_distributed.checkpoint.header import HeaderError, tensor_bytes
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import BlockScaled
from rv_distributed.errors import InputError, Problem, UsageError
from rv_distributed.plan.families import misfits
from rv_distributed.plan.layout import PIECE_ALIGNMENT, PIECE_BYTES, cut_pieces, lay_out
from rv_distributed.plan.model import Plan, PlannedInput, Requantized, Rule, Segment, TensorPlan, VectorOperand
from rv_distributed.plan.numbers import SAME, as_numbers, copied, difference, is_stored
from rv_distributed.plan.requantize import is_of_scales, requantized_tensors, with_places
from rv_distributed.plan.weights import Weigher
from rv_distributed.recipe import (
    Arithmetic,
    ByTensor,
    ComputeDType,
    Recipe,
    Rounding,
    Stats,
    Weights,
    check_pattern,
    show_alpha,
)

_MAX_REPORTED: Final = 20


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options that decide what is written."""

    dtype: str = "auto"
    """Of the output's F16, BF16 and F32 tensors: float32, bfloat16, float16, or auto: the target's own, tensor
    by tensor, and float32 for a vector."""
    max_shard_bytes: int = 5_000_000_000
    """Most tensor data in one shard; a larger tensor gets a shard to itself."""
    include: str | None = None
    """Only tensors whose name this regular expression finds get the vectors."""
    exclude: str | None = None
    """Tensors whose name this regular expression finds do not get the vectors."""
    piece_bytes: int = PIECE_BYTES
    """Size of the unit of scheduling: 1 MiB times a power of two."""
    rounding: Rounding = "nearest"
    """To outputs of 16 bits: nearest (even), or stochastic, whose expectation is the value that is rounded."""
    seed: int = 0
    """Of stochastic rounding: 0 to 2⁶⁴ − 1. The same seed gives the same bytes, wherever they are computed."""
    compute_dtype: ComputeDType = "float32"
    """In which the arithmetic is done, and alpha used."""
    stats: Stats = "full"
    """What is measured of every tensor: see the README. It changes the table and the manifest, not the weights."""

    requantize: bool = False
    """Write the target's FP8 weights as FP8 again, with new scales; without it, they become bfloat16."""

    def __post_init__(self) -> None:
        if self.requantize and self.dtype != "auto":
            raise UsageError(f"--requantize writes the target's own dtypes: leave out --dtype {self.dtype}")
        if self.dtype != "auto" and self.dtype not in FROM_USER:
            raise UsageError(f"dtype {self.dtype!r} is not one of auto, {', '.join(sorted(FROM_USER))}")
        if self.max_shard_bytes <= 0:
            raise UsageError("the largest shard must have a positive size")
        # Then the measures add up to the same sums for every size.
        if self.piece_bytes < PIECE_ALIGNMENT or self.piece_bytes & (self.piece_bytes - 1):
            raise UsageError(f"pieces must be of 1 MiB times a power of two, not of {self.piece_bytes} bytes")
        if self.rounding not in get_args(Rounding):
            raise UsageError(f"rounding {self.rounding!r} is not one of {', '.join(get_args(Rounding))}")
        if self.compute_dtype not in get_args(ComputeDType):
            raise UsageError(f"compute dtype {self.compute_dtype!r} is not one of {', '.join(get_args(ComputeDType))}")
        if self.stats not in get_args(Stats):
            raise UsageError(f"stats {self.stats!r} is not one of {', '.join(get_args(Stats))}")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed: {self.seed} is not between 0 and 2⁶⁴ − 1")
        if self.seed and self.rounding != "stochastic":
            raise UsageError(f"--seed {self.seed} changes nothing without --rounding stochastic; give both or neither")
        for pattern in (self.include, self.exclude):
            check_pattern(pattern or "")

    @property
    def is_selective(self) -> bool:
        return self.include is not None or self.exclude is not None

    def selects(self, name: str) -> bool:
        """Whether a tensor of this name gets the vectors."""
        return (self.include is None or re.search(self.include, name) is not None) and (
            self.exclude is None or re.search(self.exclude, name) is None
        )


class _Draft(NamedTuple):
    """A tensor of the output that has no place yet; see `TensorPlan`."""

    name: str
    tensor: Tensor
    """Of the frame."""
    rule: Rule
    dtype: str
    operands: tuple[VectorOperand, ...]
    why: str
    weights: tuple[Weights, ...]


class _Pair(NamedTuple):
    """One vector's checkpoints, with the vector's index in the recipe."""

    vector: int
    plus: Checkpoint
    minus: Checkpoint | None


def make_plan(recipe: Recipe, opened: Mapping[str, Checkpoint], options: PlanOptions) -> Plan:
    """Plan ``recipe`` over ``opened`` (its checkpoints by the names it gives them).

    Raises InputError with every problem of matching the checkpoints; UsageError for an empty selection.
    """
    stored, opened = opened, dict(opened)
    numbers, problems = as_numbers({name: opened[name] for name in recipe.inputs})
    opened.update(numbers)
    pairs = [
        _Pair(number, opened[vector.plus], opened[vector.minus] if vector.minus is not None else None)
        for number, vector in ((number, recipe.vectors[number]) for number in recipe.used)
    ]
    frame = opened[recipe.frame]
    extracting = recipe.operation == "extract"
    if extracting and options.requantize:
        raise UsageError("--requantize is for models; a vector is stored in float32, or in another --dtype")
    wanted = "float32" if extracting and options.dtype == "auto" else options.dtype
    weigher = Weigher(recipe, frame.tensors, options.compute_dtype)

    selects = options.selects if options.is_selective else None
    problems += misfits([stored[name] for name in recipe.inputs], selects) if pairs else []
    left_out = _only_elsewhere(frame, pairs)
    as_stored = stored[recipe.frame].tensors
    again: dict[str, Requantized] = {}
    if options.requantize:
        again, wrong = requantized_tensors(stored[recipe.frame])
        problems += wrong
    planned: list[_Draft] = []
    scales: list[_Draft] = []
    unweighted = weigher.of("", ())
    for name, tensor in frame.tensors.items():
        operands, why = _match(frame, name, tensor, pairs, options, problems, recipe)
        if extracting and not operands:
            left_out.append((name, why))
            continue
        weights = weigher.of(name, [operand.vector for operand in operands])
        if operands and recipe.target is not None and not any(of_output.moves for of_output in weights):
            operands, why, weights = (), "alpha is 0", weigher.of(name, ())
        dtype = FROM_USER[wanted] if wanted != "auto" and tensor.dtype in ARITHMETIC else tensor.dtype
        rule: Rule = "combine" if operands else "copy" if dtype == tensor.dtype and is_stored(tensor) else "cast"
        if name in again:
            of_scales = as_stored[name + SCALES]
            if not operands and isinstance(tensor.source, BlockScaled):
                del again[name]
                planned.append(_Draft(name, as_stored[name], "copy", FP8, (), why, weights))
                planned.append(_Draft(name + SCALES, of_scales, "copy", of_scales.dtype, (), why, weights))
                continue
            dtype, why_scales = FP8, "scales of requantized weights"
            scales.append(_Draft(name + SCALES, of_scales, "scale", of_scales.dtype, (), why_scales, unweighted))
        planned.append(_Draft(name, tensor, rule, dtype, operands, why, weights))
    if again:
        why = "of quantized activations"
        for name, tensor in as_stored.items():
            if name not in frame.tensors and not name.endswith(SCALES):
                planned.append(_Draft(name, tensor, "copy", tensor.dtype, (), why, unweighted))
    if pairs and not any(draft.rule == "combine" for draft in planned) and not problems:
        if any(draft.why == "alpha is 0" for draft in planned):
            raise UsageError("the alphas are 0 for every tensor")
        if options.is_selective:
            raise UsageError("--include and --exclude leave no tensor to compute")
        others = dict.fromkeys(
            c.uri for pair in pairs for c in (pair.plus, pair.minus) if c is not None and c is not frame
        )
        what = f"has no tensor in common with {', '.join(others)}"
        problems.append(Problem(frame.uri, what, "Check that all inputs are models of one architecture."))
    if problems:
        raise InputError(problems[:_MAX_REPORTED] + _rest(frame, problems))

    planned += scales
    try:
        shards = lay_out(
            [(d.name, d.dtype, d.tensor.shape, tensor_bytes(d.dtype, d.tensor.shape)) for d in planned],
            options.max_shard_bytes,
            apart=len(scales),
        )
    except HeaderError as error:
        raise UsageError(f"{error.what}; choose a smaller --max-shard-size") from None
    tensors = []
    for index, shard in enumerate(shards):
        end = len(shard.header)
        for name, tensor, rule, dtype, operands, why, weights in planned[shard.first : shard.first + shard.length]:
            start, end = end, end + tensor_bytes(dtype, tensor.shape)
            source = copied(frame, tensor) if rule == "copy" else frame.source(tensor)
            segment = Segment(end - start, None if recipe.target is None and operands else source, operands, weights)
            segments = () if rule == "scale" else (segment,)
            how = again.get(name)
            tensors.append(TensorPlan(name, dtype, tensor.shape, index, start, end, rule, segments, why, weights, how))
    return Plan(
        operation=recipe.operation,
        inputs=_inputs(recipe, opened),
        alphas=weigher.stated,
        arithmetic=Arithmetic(options.compute_dtype, options.rounding, options.seed, recipe.order),
        stats=options.stats,
        tensors=with_places(tensors, [shard.name for shard in shards]),
        shards=shards,
        # The shards of scales come out of the pieces of the others.
        pieces=cut_pieces([0 if is_of_scales(shard, tensors) else shard.size for shard in shards], options.piece_bytes),
        left_out=tuple(left_out),
        options=(
            ("dtype", wanted),
            ("max_shard_bytes", str(options.max_shard_bytes)),
            ("include", options.include or ""),
            ("exclude", options.exclude or ""),
            ("rounding", options.rounding),
            ("seed", str(options.seed)),
            ("compute_dtype", options.compute_dtype),
            ("stats", options.stats),
            ("requantize", "fp8" if options.requantize else ""),
            *_sum_options(recipe),
        ),
    )


def _sum_options(recipe: Recipe) -> list[tuple[str, str]]:
    if recipe.order == "each":
        return []
    scale = "by tensor" if isinstance(recipe.scale, ByTensor) else show_alpha(recipe.scale)
    return [("normalize", str(recipe.normalize).lower()), ("scale", scale)]


def _match(
    frame: Checkpoint,
    name: str,
    tensor: Tensor,
    pairs: Sequence[_Pair],
    options: PlanOptions,
    problems: list[Problem],
    recipe: Recipe,
) -> tuple[tuple[VectorOperand, ...], str]:
    """The vectors' operands for one tensor of the frame, and why there are none, if so."""
    if not pairs:
        return (), "alpha is 0"
    if not options.selects(name):
        return (), "not selected by --include and --exclude"
    operands, why, blamed = [], "not in any vector", False
    for pair in pairs:
        plus = pair.plus.tensors.get(name)
        minus = pair.minus.tensors.get(name) if pair.minus is not None else None
        if plus is None or (pair.minus is not None and minus is None):
            if plus is not None or minus is not None:
                why = f"not in the {'donor' if plus is None else 'reference'}"
            elif recipe.operation == "linear":
                remedy = "Give models with the same tensors, or leave the tensor out with --exclude."
                problems.append(Problem(pair.plus.uri, f"is not there, but in {frame.uri}", remedy, name))
            continue
        present = [(pair.plus, plus)] + ([(pair.minus, minus)] if pair.minus is not None and minus is not None else [])
        if not DTYPES[tensor.dtype].is_float:
            why = f"{tensor.dtype} is not a floating-point dtype"
            continue
        sound = tensor.dtype in ARITHMETIC
        if not sound and not blamed:
            problems.append(_cannot_compute(frame.uri, name, tensor.dtype))
            blamed = True
        for checkpoint, other in present:
            if other.shape != tensor.shape:
                against = {"extract": "donor", "linear": "base"}.get(recipe.operation, "target")
                what = f"has shape {list(other.shape)}, but {list(tensor.shape)} in the {against}"
                remedy = "Check that the inputs are the same model, or leave the tensor out with --exclude."
                problems.append(Problem(checkpoint.uri, what, remedy, name))
                sound = False
            elif other.dtype not in ARITHMETIC and tensor.dtype in ARITHMETIC:
                problems.append(_cannot_compute(checkpoint.uri, name, other.dtype))
                sound = False
        if sound:
            sources = [checkpoint.source(other) for checkpoint, other in present]
            operand = difference(pair.vector, sources[0], sources[1] if len(sources) > 1 else None)
            if operand is not None:
                operands.append(operand)
            else:
                why = SAME
    return tuple(operands), "" if operands else why


def _cannot_compute(where: str, name: str, dtype: str) -> Problem:
    what = f"is {dtype}; arithmetic is done on {', '.join(ARITHMETIC)}"
    return Problem(where, what, "Convert the checkpoint first, or leave the tensor out with --exclude.", name)


def _only_elsewhere(frame: Checkpoint, pairs: Sequence[_Pair]) -> list[tuple[str, str]]:
    names: dict[str, str] = {}
    for pair in pairs:
        for checkpoint in (pair.plus, pair.minus):
            if checkpoint is not None and checkpoint is not frame:
                for name in checkpoint.tensors.keys() - frame.tensors.keys():
                    names.setdefault(name, f"only in {checkpoint.uri}")
    return sorted(names.items())


def _rest(frame: Checkpoint, problems: Sequence[Problem]) -> list[Problem]:
    more = len(problems) - _MAX_REPORTED
    if more <= 0:
        return []
    return [Problem(frame.uri, f"{more} more tensors have such problems", "Correct the ones above first.")]


def _inputs(recipe: Recipe, opened: Mapping[str, Checkpoint]) -> tuple[PlannedInput, ...]:
    roles = [("target", recipe.target)] if recipe.target is not None else []
    roles += [("base", recipe.base)] if recipe.base is not None else []
    for vector in recipe.vectors:
        if vector.minus is None:
            roles.append(("model" if recipe.operation == "linear" else "vector", vector.plus))
        else:
            roles += [("donor", vector.plus), ("reference", vector.minus)]
    planned = []
    for number, (role, name) in enumerate(roles):
        for which, checkpoint in zip((role, "adapter"), opened[name].folders, strict=False):
            files = checkpoint.weight_files
            # Small files go with the output; of an adapter, one decides what is computed.
            if number == 0 or which == "adapter":
                files += checkpoint.sidecars
            planned.append(PlannedInput(which, checkpoint.uri, checkpoint.fingerprint, checkpoint.revision, files))
    return tuple(planned)
