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
from rv_distributed.checkpoint.header import HeaderError, tensor_bytes
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.uris import join
from rv_distributed.errors import InputError, Problem, UsageError
from rv_distributed.plan.families import misfits
from rv_distributed.plan.layout import PIECE_ALIGNMENT, PIECE_BYTES, cut_pieces, lay_out
from rv_distributed.plan.model import Operand, Plan, PlannedInput, Rule, TensorPlan, VectorOperand
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

    def __post_init__(self) -> None:
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
    pairs = [
        _Pair(number, opened[vector.plus], opened[vector.minus] if vector.minus is not None else None)
        for number, vector in ((number, recipe.vectors[number]) for number in recipe.used)
    ]
    frame = opened[recipe.frame]
    extracting = recipe.operation == "extract"
    wanted = "float32" if extracting and options.dtype == "auto" else options.dtype
    weigher = Weigher(recipe, frame.tensors, options.compute_dtype)

    selects = options.selects if options.is_selective else None
    problems = misfits([opened[name] for name in recipe.inputs], selects) if pairs else []
    left_out = _only_elsewhere(frame, pairs)
    planned: list[_Draft] = []
    for name, tensor in frame.tensors.items():
        operands, why = _match(frame, name, tensor, pairs, options, problems, recipe)
        if extracting and not operands:
            left_out.append((name, why))
            continue
        weights = weigher.of(name, [operand.vector for operand in operands])
        if operands and recipe.target is not None and not any(of_output.moves for of_output in weights):
            operands, why, weights = (), "alpha is 0", weigher.of(name, ())
        dtype = FROM_USER[wanted] if wanted != "auto" and tensor.dtype in ARITHMETIC else tensor.dtype
        rule: Rule = "combine" if operands else "copy" if dtype == tensor.dtype else "cast"
        planned.append(_Draft(name, tensor, rule, dtype, operands, why, weights))
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

    try:
        shards = lay_out(
            [(d.name, d.dtype, d.tensor.shape, tensor_bytes(d.dtype, d.tensor.shape)) for d in planned],
            options.max_shard_bytes,
        )
    except HeaderError as error:
        raise UsageError(f"{error.what}; choose a smaller --max-shard-size") from None
    tensors = []
    for index, shard in enumerate(shards):
        end = len(shard.header)
        for name, tensor, rule, dtype, operands, why, weights in planned[shard.first : shard.first + shard.length]:
            start, end = end, end + tensor_bytes(dtype, tensor.shape)
            target = None if recipe.target is None and operands else _operand(frame, tensor)
            tensors.append(
                TensorPlan(name, dtype, tensor.shape, index, start, end, rule, target, operands, why, weights)
            )
    return Plan(
        operation=recipe.operation,
        inputs=_inputs(recipe, opened),
        alphas=weigher.stated,
        arithmetic=Arithmetic(options.compute_dtype, options.rounding, options.seed, recipe.order),
        stats=options.stats,
        tensors=tuple(tensors),
        shards=shards,
        pieces=cut_pieces([shard.size for shard in shards], options.piece_bytes),
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
            minus_operand = _operand(pair.minus, minus) if pair.minus is not None and minus is not None else None
            operands.append(VectorOperand(pair.vector, _operand(pair.plus, plus), minus_operand))
    return tuple(operands), "" if operands else why


def _cannot_compute(where: str, name: str, dtype: str) -> Problem:
    what = f"is {dtype}; arithmetic is done on {', '.join(ARITHMETIC)}"
    return Problem(where, what, "Convert the checkpoint first, or leave the tensor out with --exclude.", name)


def _operand(checkpoint: Checkpoint, tensor: Tensor) -> Operand:
    return Operand(join(checkpoint.uri, tensor.file), tensor.start, tensor.dtype)


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
    return tuple(
        PlannedInput(
            role,
            opened[uri].uri,
            opened[uri].fingerprint,
            opened[uri].revision,
            opened[uri].weight_files + (opened[uri].sidecars if number == 0 else ()),
        )
        for number, (role, uri) in enumerate(roles)
    )
