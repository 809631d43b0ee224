"""From a recipe and its opened checkpoints to a plan: match tensors, choose rules and dtypes, lay out.

The frame (the target, or the donor when a vector is extracted) gives names, shapes, order and, with
``dtype="auto"``, the dtype of every output tensor. All problems are found before any is raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rv_distributed.checkpoint.adapter import is_adapter
from rv_distributed.checkpoint.config import vocab_size
from rv_distributed.checkpoint.dtypes import ARITHMETIC, FROM_USER, item_bytes
from rv_distributed.checkpoint.header import HeaderError, tensor_bytes
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.checkpoint.sidecars import sidecars_of
from rv_distributed.checkpoint.sources import Source
from rv_distributed.errors import MAX_REPORTED, InputError, Problem, UsageError
from rv_distributed.plan.families import Tokens, misfits, no_difference
from rv_distributed.plan.finding import Finder, Frame
from rv_distributed.plan.layout import cut_pieces, lay_out
from rv_distributed.plan.matching import Match, Matching, Pair, Side, match
from rv_distributed.plan.model import Plan, PlannedInput, PlannedSidecar, Rule, Segment, ShardPlan, TensorPlan
from rv_distributed.plan.numbers import SAME, as_numbers, copied, is_stored
from rv_distributed.plan.options import PlanOptions
from rv_distributed.plan.requantize import Draft, is_of_scales, requantized, with_places
from rv_distributed.plan.weights import Weigher
from rv_distributed.recipe import Arithmetic, ByTensor, Recipe, show_alpha
from rv_distributed.units import plural


def make_plan(recipe: Recipe, opened: Mapping[str, Checkpoint], options: PlanOptions) -> Plan:
    """Plan ``recipe`` over ``opened`` (its checkpoints by the names it gives them).

    Raises InputError with every problem of matching the checkpoints; UsageError for an empty selection, and for options
    that do not go with the recipe.
    """
    extracting = recipe.operation == "extract"
    if extracting and options.requantize:
        raise UsageError("--requantize is for models; a vector is stored in float32, or in another --dtype")
    stored = {name: opened[name] for name in recipe.inputs}
    numbers, problems = as_numbers(stored)
    opened = {**opened, **numbers}
    frame, giver = opened[recipe.frame], opened[recipe.giver(options.sidecars_from)]
    wanted = "float32" if extracting and options.dtype == "auto" else options.dtype
    weigher = Weigher(recipe, frame.tensors, options.compute_dtype)

    pairs = _pairs(recipe, opened, options)
    problems += misfits(list(stored.values()), options) if pairs else []
    if pairs and any(is_adapter(checkpoint) for checkpoint in stored.values()):
        raise InputError(problems)  # what its tensors are called is then no problem of theirs
    matching = match(Frame(frame, recipe.frame_role), pairs, options)
    problems += [*matching.problems, *_giver_problems(frame, giver)]
    drafts, left_out = _drafts(frame, matching, weigher, recipe, wanted)
    if pairs and not problems and not any(draft.rule == "combine" for draft in drafts):
        problems += _nothing_to_compute(frame, pairs, drafts, left_out, options)
    scales: list[Draft] = []
    if options.requantize:
        drafts, scales, wrong = requantized(drafts, stored[recipe.frame], weigher.of("", ()))
        problems += wrong
    if problems:
        raise InputError(problems[:MAX_REPORTED] + _rest(frame, problems))

    shards, tensors = _laid_out([*drafts, *scales], len(scales), options.max_shard_bytes)
    return Plan(
        operation=recipe.operation,
        inputs=_inputs(recipe, opened, options),
        alphas=weigher.stated,
        arithmetic=Arithmetic(options.compute_dtype, options.rounding, options.seed, recipe.order),
        stats=options.stats,
        tensors=tensors,
        shards=shards,
        # The shards of scales come out of the pieces of the others.
        pieces=cut_pieces([0 if is_of_scales(shard, tensors) else shard.size for shard in shards], options.piece_bytes),
        left_out=(*matching.left_out, *left_out),
        giver=giver.uri,
        sidecars=tuple(PlannedSidecar(owner.uri, file.name, file.size) for owner, file in sidecars_of(frame, giver)),
        files_left_out=giver.left_out,
        rules=(*matching.rules, *_rules_of_numbers(tensors)),
        warnings=matching.warnings,
        options=(*options.recorded(wanted), *_sum_options(recipe)),
    )


def _drafts(
    frame: Checkpoint, matching: Matching, weigher: Weigher, recipe: Recipe, wanted: str
) -> tuple[list[Draft], list[tuple[str, str]]]:
    """What becomes of each tensor of the frame, and those that an extract leaves out, each with the reason."""
    drafts, left_out = [], []
    for (name, tensor), matched in zip(frame.tensors.items(), matching.tensors, strict=True):
        if recipe.operation == "extract" and not matched.stretches:
            left_out.append((name, matched.why))
            continue
        own = frame.source(tensor), copied(frame, tensor)
        segments = _segments(weigher, name, matched, own if recipe.target is not None else None)
        if segments and recipe.target is not None and not any(each.moves for s in segments for each in s.weights):
            segments, matched = (), Match((), "alpha is 0", "")
        dtype = FROM_USER[wanted] if wanted != "auto" and tensor.dtype in ARITHMETIC else tensor.dtype
        rule: Rule = "combine" if segments else "copy" if dtype == tensor.dtype and is_stored(tensor) else "cast"
        segments = segments or (Segment(tensor.elements, own[1], (), weigher.of(name, ())),)
        drafts.append(Draft(name, tensor, rule, dtype, segments, matched.why, matched.matched))
    return drafts, left_out


def _nothing_to_compute(
    frame: Checkpoint,
    pairs: Sequence[Pair],
    drafts: Sequence[Draft],
    left_out: Sequence[tuple[str, str]],
    options: PlanOptions,
) -> list[Problem]:
    """Why no tensor would be computed. Raises UsageError when it was asked for."""
    if any(draft.why == "alpha is 0" for draft in drafts):
        raise UsageError("the alphas are 0 for every tensor")
    if options.is_selective:
        raise UsageError("--include and --exclude leave no tensor to compute")
    if SAME in {*(draft.why for draft in drafts), *(why for _, why in left_out)}:
        both = [(pair.plus.finder.checkpoint, pair.minus.finder.checkpoint) for pair in pairs if pair.minus is not None]
        return [no_difference(donor, reference) for donor, reference in both if donor.uri == reference.uri]
    others = dict.fromkeys(side.finder.checkpoint.name for pair in pairs for side in pair.sides)
    what = f"has no tensor in common with {', '.join(name for name in others if name != frame.name)}"
    return [Problem(frame.uri, what, "Check that all inputs are models of one architecture.")]


def _laid_out(
    drafts: Sequence[Draft], scales: int, max_shard_bytes: int
) -> tuple[tuple[ShardPlan, ...], tuple[TensorPlan, ...]]:
    """The shards, and the tensors with their places in them; the last ``scales`` drafts lie in shards of their own."""
    try:
        shards = lay_out(
            [(d.name, d.dtype, d.tensor.shape, tensor_bytes(d.dtype, d.tensor.shape)) for d in drafts],
            max_shard_bytes,
            apart=scales,
        )
    except HeaderError as error:
        raise UsageError(f"{error.what}; choose a smaller --max-shard-size") from None
    tensors = []
    for index, shard in enumerate(shards):
        end = len(shard.header)
        for name, tensor, rule, dtype, segments, why, as_, how in drafts[shard.first : shard.first + shard.length]:
            start, end = end, end + tensor_bytes(dtype, tensor.shape)
            cut = _cut(segments, dtype, end - start)
            tensors.append(TensorPlan(name, dtype, tensor.shape, index, start, end, rule, cut, why, as_, how))
    return shards, with_places(tensors, [shard.name for shard in shards])


def _rules_of_numbers(tensors: Sequence[TensorPlan]) -> Iterator[tuple[str, str]]:
    """How elements change on their way from the inputs to the output, in words."""
    for rule, texts in (
        ("dtypes", [f"{of} → {tensor.dtype}" for tensor in tensors if (of := tensor.input_dtypes)]),
        ("decoded", [tensor.decoded for tensor in tensors]),
        ("requantized", [tensor.requantized.described for tensor in tensors if tensor.requantized is not None]),
    ):
        for text, count in Counter(filter(None, texts)).most_common():
            yield rule, f"{text} ({plural(count, 'tensor')})"


def _sum_options(recipe: Recipe) -> list[tuple[str, str]]:
    if recipe.order == "each":
        return []
    scale = "by tensor" if isinstance(recipe.scale, ByTensor) else show_alpha(recipe.scale)
    return [("normalize", str(recipe.normalize).lower()), ("scale", scale)]


def _pairs(recipe: Recipe, opened: Mapping[str, Checkpoint], options: PlanOptions) -> list[Pair]:
    """The vectors that are used, with their checkpoints as the frame sees them."""
    frame, finders = Frame(opened[recipe.frame], recipe.frame_role), dict[str, Finder]()
    overlap = options.vocab_mismatch == "overlap"
    if overlap and recipe.operation == "linear":
        raise UsageError("--vocab-mismatch overlap: a sum of models has no target whose other rows could stay")

    def side(role: str, name: str) -> Side:
        checkpoint = opened[name]
        if checkpoint.name not in finders:
            finders[checkpoint.name] = Finder(checkpoint, frame, options.key_mapping, overlap=overlap)
        return Side(role, finders[checkpoint.name])

    pairs = []
    for number in recipe.used:
        vector = recipe.vectors[number]
        if vector.minus is None:
            role = "model" if recipe.operation == "linear" else "vector"
            pairs.append(Pair(number, side(role, vector.plus), None))
        else:
            pairs.append(Pair(number, side("donor", vector.plus), side("reference", vector.minus)))
    return pairs


def _segments(weigher: Weigher, name: str, matched: Match, target: tuple[Source, Source] | None) -> tuple[Segment, ...]:
    """``target`` says where the tensor comes from: where it is computed with, and where it is copied."""
    return tuple(
        Segment(
            stop,
            target and target[not vectors],
            vectors,
            weigher.of(name, [operand.vector for operand in vectors]),
        )
        for stop, vectors in matched.stretches
    )


def _cut(segments: tuple[Segment, ...], dtype: str, nbytes: int) -> tuple[Segment, ...]:
    """Segments by elements as segments by bytes, of a tensor of ``nbytes`` bytes."""
    if len(segments) == 1:
        return (segments[0]._replace(stop=nbytes),)
    return tuple(segment._replace(stop=segment.stop * item_bytes(dtype)) for segment in segments)


def _giver_problems(frame: Checkpoint, giver: Checkpoint) -> list[Problem]:
    """Whether another input's tokenizer would have tokens that the output has no rows for."""
    rows = vocab_size(frame.config)
    if giver is frame or rows is None:
        return []
    tokens = Tokens()
    vocabulary = tokens.of(giver)
    last = max(vocabulary.tokens, default=0) if vocabulary else 0
    if last < rows:
        return tokens.problems
    what = f"has a tokenizer with ids up to {last}, but the output has the {rows} rows of {frame.uri}"
    return [Problem(giver.uri, what, "Take the small files of another input, or leave out --sidecars-from.")]


def _rest(frame: Checkpoint, problems: Sequence[Problem]) -> list[Problem]:
    more = len(problems) - MAX_REPORTED
    if more <= 0:
        return []
    return [Problem(frame.uri, f"{more} more tensors have such problems", "Correct the ones above first.")]


def _inputs(recipe: Recipe, opened: Mapping[str, Checkpoint], options: PlanOptions) -> tuple[PlannedInput, ...]:
    given = sidecars_of(opened[recipe.frame], opened[recipe.giver(options.sidecars_from)])
    planned, seen = [], set[str]()
    for role, name in recipe.roles:
        checkpoint = opened[name]
        small = tuple(file for owner, file in given if owner is checkpoint and name not in seen)
        seen.add(name)
        for which, folder in zip((role, "adapter"), checkpoint.folders, strict=False):
            # Small files go with the output; of an adapter, one decides what is computed.
            files = folder.weight_files + (folder.sidecars if which == "adapter" else small)
            planned.append(PlannedInput(which, folder.uri, folder.fingerprint, folder.revision, files))
    return tuple(planned)
