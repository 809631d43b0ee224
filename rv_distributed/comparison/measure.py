"""Comparing two checkpoints: a plan that measures A − B against B and writes nothing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import NamedTuple

import numpy as np

from rv_distributed.checkpoint.dtypes import ARITHMETIC, DTYPES
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.uris import join
from rv_distributed.comparison.model import Diff, Sums, TensorDiff, Unlike, sums_of
from rv_distributed.errors import InputError, PieceError, Problem
from rv_distributed.measures import Leaf, add_up
from rv_distributed.opening import open_checkpoint
from rv_distributed.plan import Operand, PieceTask, Plan, ShardPlan, TensorPlan, cut_pieces, task_of
from rv_distributed.plan.model import VectorOperand
from rv_distributed.recipe import Arithmetic, Weights
from rv_distributed.runtime.dry import DryStream, dry_config, each_piece
from rv_distributed.runtime.model import BLOCK_BYTES
from rv_distributed.storage.same import windows

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
    total = sum(pair.b.stop - pair.b.start for pair in alike)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    found = dict(_measure(one, other, measured, count))
    for pair in opaque:
        found[pair.name] = Sums(1, pair.b.elements, _differing(one, other, pair))
        count(pair.b.stop - pair.b.start)
    return Diff(
        a=one.uri,
        b=other.uri,
        tensors=tuple(
            TensorDiff(name, x.dtype, y.dtype, y.shape, y.dtype in ARITHMETIC, found[name]) for name, x, y in alike
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
    return opened[0], opened[1]


def _is_alike(pair: _Pair) -> bool:
    same = pair.a.dtype == pair.b.dtype and DTYPES[pair.b.dtype].bits >= 8
    return pair.a.shape == pair.b.shape and (same or {pair.a.dtype, pair.b.dtype} <= ARITHMETIC.keys())


def _form(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


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
        start, end = end, end + y.stop - y.start
        target, plus = (Operand(join(c.uri, t.file), t.start, t.dtype) for c, t in ((other, y), (one, x)))
        vectors = (VectorOperand(0, plus, target),)
        tensors.append(TensorPlan(name, y.dtype, y.shape, 0, start, end, "combine", target, vectors, "", weights))
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
    width = max(1, (pair.b.stop - pair.b.start) // max(1, math.prod(pair.b.shape)))
    paths = [join(one.uri, pair.a.file), join(other.uri, pair.b.file)]
    differing = 0
    try:
        with closing(windows((paths[0], pair.a.start), (paths[1], pair.b.start), pair.b.stop - pair.b.start)) as read:
            for x, y in read:
                rows = [np.frombuffer(window, np.uint8).reshape(-1, width) for window in (x, y)]
                differing += int(np.count_nonzero((rows[0] != rows[1]).any(axis=1)))
    except OSError as error:
        cause = f"cannot be read: {error.strerror or error}"
        raise PieceError(cause, paths[0], pair.a.start, pair.a.stop, (pair.name,)) from error
    return differing
