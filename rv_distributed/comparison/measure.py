"""Comparing two checkpoints: a plan that measures A − B against B and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from rv_distributed.checkpoint.dtypes import ARITHMETIC, DTYPES, item_bytes
from rv_distributed.checkpoint.header import tensor_bytes
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import BlockScaled, LowRank, Source, path_of
from rv_distributed.comparison.model import Diff, Sums, TensorDiff, Unlike, sums_of
from rv_distributed.errors import InputError, PieceError, Problem
from rv_distributed.measures import Leaf, add_up
from rv_distributed.opening import open_checkpoint
from rv_distributed.plan import PieceTask, Plan, Segment, ShardPlan, TensorPlan, as_numbers, cut_pieces, task_of
from rv_distributed.plan.model import VectorOperand
from rv_distributed.recipe import Arithmetic, Weights
from rv_distributed.runtime.decoding import read_source
from rv_distributed.runtime.dry import DryStream, dry_config, each_piece
from rv_distributed.runtime.model import BLOCK_BYTES

_READ_BYTES: Final = 8 << 20
DiffProgress = Callable[[int, int], None]
"""Called with the bytes compared so far, and those in all."""


class _Pair(NamedTuple):
    """A tensor of both."""

    name: str
    a: Tensor
    b: Tensor


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: DiffProgress | None = None) -> Diff:
    """What differs between two checkpoints, tensor by tensor: both are read once, and nothing is written.

    Differences are ``RN32(a − b)``, their sums in float64. Raises InputError when a checkpoint cannot be opened,
    and PieceError when it cannot be read.
    """
    one, other = _open(a, b)
    pairs = [_Pair(name, one.tensors[name], tensor) for name, tensor in other.tensors.items() if name in one.tensors]
    alike = [pair for pair in pairs if _is_alike(pair)]
    measured = [pair for pair in alike if pair.b.dtype in ARITHMETIC]
    opaque = [pair for pair in alike if pair.b.dtype not in ARITHMETIC]
    total = sum(_nbytes(pair) for pair in alike)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    found = dict(_measure(one, other, measured, count))
    for pair in opaque:
        found[pair.name] = Sums(1, pair.b.elements, _differing(one, other, pair))
        count(_nbytes(pair))
    return Diff(
        a=one.name,
        b=other.name,
        tensors=tuple(
            TensorDiff(name, _dtype(x), _dtype(y), y.shape, y.dtype in ARITHMETIC, found[name]) for name, x, y in alike
        ),
        unlike=tuple(Unlike(name, _form(x), _form(y)) for name, x, y in pairs if name not in found),
        only_in_a=tuple(name for name in one.tensors if name not in other.tensors),
        only_in_b=tuple(name for name in other.tensors if name not in one.tensors),
    )


def _open(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> tuple[Checkpoint, Checkpoint]:
    opened: list[Checkpoint] = []
    problems: list[Problem] = []
    for name in (a, b):
        try:
            opened.append(open_checkpoint(name))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    numbers, problems = as_numbers({str(number): checkpoint for number, checkpoint in enumerate(opened)})
    if problems:
        raise InputError(problems)
    return numbers["0"], numbers["1"]


def _is_alike(pair: _Pair) -> bool:
    same = pair.a.dtype == pair.b.dtype and DTYPES[pair.b.dtype].bits >= 8
    return pair.a.shape == pair.b.shape and (same or {pair.a.dtype, pair.b.dtype} <= ARITHMETIC.keys())


def _nbytes(pair: _Pair) -> int:
    return tensor_bytes(pair.b.dtype, pair.b.shape)


def _dtype(tensor: Tensor) -> str:
    """As it is stored."""
    return tensor.source.weight.dtype if isinstance(tensor.source, BlockScaled) else tensor.dtype


def _form(tensor: Tensor) -> str:
    return f"{_dtype(tensor)} {list(tensor.shape)}"


def _measure(
    one: Checkpoint, other: Checkpoint, pairs: list[_Pair], count: Callable[[int], None]
) -> Iterator[tuple[str, Sums]]:
    """The sums of tensors that arithmetic reads."""
    if not pairs:
        return
    plan = _plan(one, other, pairs)
    config = dry_config(plan, output="", stats="full")
    leaves: list[list[Leaf]] = [[] for _ in pairs]
    tasks = (task_of(plan, piece) for piece in plan.pieces)
    for piece, of_piece in zip(plan.pieces, each_piece(tasks, config, _look), strict=True):
        for number, leaf in of_piece:
            leaves[number].append(leaf)
        count(piece.stop - piece.start)
    for pair, of_tensor in zip(pairs, leaves, strict=True):
        yield pair.name, sums_of(add_up(of_tensor), pair.b.elements)


def _look(stream: DryStream, task: PieceTask) -> list[tuple[int, Leaf]]:
    """The measures of a piece's tensors."""
    found: list[list[Leaf]] = [[] for _ in task.spans]
    for dry in stream.chunks(task):
        for part, leaves in zip(dry.chunk.parts, dry.leaves, strict=True):
            found[part.span] += leaves
    block = task.piece.start // BLOCK_BYTES
    return [(span.tensor, (block, add_up(leaves))) for span, leaves in zip(task.spans, found, strict=True)]


def _plan(one: Checkpoint, other: Checkpoint, pairs: list[_Pair]) -> Plan:
    """B + 1·(A − B), in one file that is never written."""
    weights = (Weights((1.0,)),)
    tensors, end = [], 0
    for name, x, y in pairs:
        nbytes = tensor_bytes(y.dtype, y.shape)
        start, end = end, end + nbytes
        target = other.source(y)
        segment = Segment(nbytes, target, (VectorOperand(0, one.source(x), target),), weights)
        tensors.append(TensorPlan(name, y.dtype, y.shape, 0, start, end, "combine", (segment,), "", ""))
    return Plan(
        operation="transfer",
        inputs=(),
        alphas=((1.0,),),
        arithmetic=Arithmetic("float32", "nearest", 0),
        stats="full",
        tensors=tuple(tensors),
        shards=(ShardPlan("", b"", end, 0, len(tensors)),),
        pieces=cut_pieces([end]),
        left_out=(),
        options=(),
    )


def _differing(one: Checkpoint, other: Checkpoint, pair: _Pair) -> int:
    """Elements with other bytes, of a dtype that arithmetic does not read."""
    sources = _as_bytes(one, pair.a), _as_bytes(other, pair.b)
    width = item_bytes(pair.b.dtype)
    nbytes = pair.b.elements * width
    differing = 0
    for start in range(0, nbytes, _READ_BYTES // width * width):
        size = min(_READ_BYTES // width * width, nbytes - start)
        try:
            x, y = (read_source(source, start, size).reshape(-1, width) for source in sources)
        except OSError as error:
            path = path_of(sources[0], start)
            raise PieceError(f"cannot be read: {error}", path, pair.a.start, pair.a.stop, (pair.name,)) from error
        differing += int(np.count_nonzero((x != y).any(axis=1)))
    return differing


def _as_bytes(checkpoint: Checkpoint, tensor: Tensor) -> Source:
    source = checkpoint.source(tensor)
    if isinstance(source, BlockScaled | LowRank):
        raise TypeError(f"{tensor.dtype} of {source} is computed")
    return source.as_bytes()
