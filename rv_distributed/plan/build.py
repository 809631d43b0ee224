"""From a recipe and its opened checkpoints to a plan: match tensors, choose rules and dtypes, lay out.

The frame (the target, or the donor when a vector is extracted) gives names, shapes, order and, with
``dtype="auto"``, the dtype of every output tensor. All problems are found before any is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from rv_distributed.checkpoint.config import vocab_size
from rv_distributed.checkpoint.dtypes import ARITHMETIC, FROM_USER, item_bytes
from rv_distributed.checkpoint.header import HeaderError, tensor_bytes
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sidecars import sidecars_of
from rv_distributed.errors import InputError, Problem, UsageError
from rv_distributed.plan.families import misfits
from rv_distributed.plan.layout import cut_pieces, lay_out
from rv_distributed.plan.matching import Match, Pair, Side, match
from rv_distributed.plan.model import Operand, Plan, PlannedInput, PlannedSidecar, Rule, Segment, TensorPlan
from rv_distributed.plan.options import PlanOptions
from rv_distributed.plan.sources import Frame, Source
from rv_distributed.recipe import Arithmetic, ComputeDType, Recipe, as_float32

_MAX_REPORTED: Final = 20


class _Entry(NamedTuple):
    """A tensor of the output, before it has a place."""

    name: str
    tensor: Tensor
    """As the frame has it."""
    dtype: str
    rule: Rule
    match: Match


def make_plan(recipe: Recipe, opened: Mapping[str, Checkpoint], options: PlanOptions) -> Plan:
    """Plan ``recipe`` over ``opened`` (its checkpoints by the names it gives them).

    Raises InputError with every problem of matching the checkpoints; UsageError for an empty selection, and for an
    input that is to give the small files and is not there.
    """
    alphas = tuple(tuple(_rounded(alpha, options.compute_dtype) for alpha in row) for row in recipe.alphas)
    frame, giver = opened[recipe.frame], opened[recipe.giver(options.sidecars_from)]
    extracting = recipe.target is None
    wanted = "float32" if extracting and options.dtype == "auto" else options.dtype

    seen = Frame(frame, recipe.roles[0][0])
    pairs = _pairs(recipe, opened, seen, options)
    problems = misfits([opened[name] for name in recipe.inputs], options) if pairs else []
    matching = match(seen, pairs, options)
    problems += [*matching.problems, *_giver_problems(frame, giver)]
    left_out = list(matching.left_out)
    entries: list[_Entry] = []
    for (name, tensor), matched in zip(frame.tensors.items(), matching.tensors, strict=True):
        if extracting and not matched.stretches:
            left_out.append((name, matched.why))
            continue
        dtype = FROM_USER[wanted] if wanted != "auto" and tensor.dtype in ARITHMETIC else tensor.dtype
        rule: Rule = "combine" if matched.stretches else "copy" if dtype == tensor.dtype else "cast"
        entries.append(_Entry(name, tensor, dtype, rule, matched))
    if pairs and not problems and not any(entry.rule == "combine" for entry in entries):
        if options.is_selective:
            raise UsageError("--include and --exclude leave no tensor to compute")
        others = dict.fromkeys(side.source.checkpoint.uri for pair in pairs for side in pair.sides)
        what = f"has no tensor in common with {', '.join(uri for uri in others if uri != frame.uri)}"
        problems.append(Problem(frame.uri, what, "Check that all inputs are models of one architecture."))
    if problems:
        raise InputError(problems[:_MAX_REPORTED] + _rest(frame, problems))

    try:
        shards = lay_out(
            [(e.name, e.dtype, e.tensor.shape, tensor_bytes(e.dtype, e.tensor.shape)) for e in entries],
            options.max_shard_bytes,
        )
    except HeaderError as error:
        raise UsageError(f"{error.what}; choose a smaller --max-shard-size") from None
    paths = {file.name: f"{frame.uri}/{file.name}" for file in frame.weight_files}
    tensors = []
    for index, shard in enumerate(shards):
        end = len(shard.header)
        for name, tensor, dtype, rule, matched in entries[shard.first : shard.first + shard.length]:
            start, end = end, end + tensor_bytes(dtype, tensor.shape)
            target = None if extracting else Operand(paths[tensor.file], tensor.start, tensor.dtype)
            segments = _segments(end - start, dtype, target, matched)
            tensors.append(
                TensorPlan(name, dtype, tensor.shape, index, start, end, rule, segments, matched.why, matched.matched)
            )
    return Plan(
        operation=recipe.operation,
        inputs=_inputs(recipe, opened, options),
        alphas=alphas,
        arithmetic=Arithmetic(options.compute_dtype, options.rounding, options.seed),
        stats=options.stats,
        tensors=tuple(tensors),
        shards=shards,
        pieces=cut_pieces([shard.size for shard in shards], options.piece_bytes),
        left_out=tuple(left_out),
        giver=giver.uri,
        sidecars=tuple(PlannedSidecar(owner.uri, file.name, file.size) for owner, file in sidecars_of(frame, giver)),
        files_left_out=giver.left_out,
        rules=matching.rules,
        options=options.recorded(wanted),
    )


def _pairs(recipe: Recipe, opened: Mapping[str, Checkpoint], frame: Frame, options: PlanOptions) -> list[Pair]:
    """The vectors that are used, with their checkpoints as the frame sees them."""
    sources: dict[str, Source] = {}

    def side(role: str, name: str) -> Side:
        checkpoint = opened[name]
        if checkpoint.uri not in sources:
            overlap = options.vocab_mismatch == "overlap"
            sources[checkpoint.uri] = Source(checkpoint, frame, options.key_mapping, overlap=overlap)
        return Side(role, sources[checkpoint.uri])

    pairs = []
    for number in recipe.used:
        vector = recipe.vectors[number]
        if vector.minus is None:
            pairs.append(Pair(number, side("vector", vector.plus), None))
        else:
            pairs.append(Pair(number, side("donor", vector.plus), side("reference", vector.minus)))
    return pairs


def _segments(nbytes: int, dtype: str, target: Operand | None, matched: Match) -> tuple[Segment, ...]:
    """What is made alike of a tensor of ``nbytes`` bytes."""
    if len(matched.stretches) <= 1:
        return (Segment(nbytes, target, matched.stretches[0][1] if matched.stretches else ()),)
    item = item_bytes(dtype)
    return tuple(Segment(stop * item, target, vectors) for stop, vectors in matched.stretches)


def _giver_problems(frame: Checkpoint, giver: Checkpoint) -> list[Problem]:
    """Whether another input's tokenizer would have tokens that the output has no rows for."""
    rows = vocab_size(frame.config)
    last = max(giver.vocabulary or {0: ""})
    if giver is frame or rows is None or last < rows:
        return []
    what = f"has a tokenizer with ids up to {last}, but the output has the {rows} rows of {frame.uri}"
    return [Problem(giver.uri, what, "Take the small files of another input, or leave out --sidecars-from.")]


def _rounded(alpha: float, dtype: ComputeDType) -> float:
    """``alpha`` as the arithmetic uses it. One that is 0 in float32 is 0: `Recipe.used` goes by that."""
    single = as_float32(alpha)
    return alpha if dtype == "float64" and single else single


def _rest(frame: Checkpoint, problems: Sequence[Problem]) -> list[Problem]:
    more = len(problems) - _MAX_REPORTED
    if more <= 0:
        return []
    return [Problem(frame.uri, f"{more} more tensors have such problems", "Correct the ones above first.")]


def _inputs(recipe: Recipe, opened: Mapping[str, Checkpoint], options: PlanOptions) -> tuple[PlannedInput, ...]:
    given = sidecars_of(opened[recipe.frame], opened[recipe.giver(options.sidecars_from)])
    planned, seen = [], set[str]()
    for role, name in recipe.roles:
        checkpoint = opened[name]
        small = tuple(file for owner, file in given if owner is checkpoint and checkpoint.uri not in seen)
        seen.add(checkpoint.uri)
        files = checkpoint.weight_files + small
        planned.append(PlannedInput(role, checkpoint.uri, checkpoint.fingerprint, checkpoint.revision, files))
    return tuple(planned)
