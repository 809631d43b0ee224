"""The plan: a pure, deterministic description of a run, and the tasks that workers get from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rv_distributed.checkpoint.manifest import WITHOUT_TARGET
from rv_distributed.checkpoint.model import FileState
from rv_distributed.recipe import Arithmetic, Operation, Stats, Weights

Rule = Literal["combine", "cast", "copy"]


class Operand(NamedTuple):
    """A source tensor: ``elements`` of ``dtype`` in ``path`` from byte ``offset``."""

    path: str
    offset: int
    dtype: str


class VectorOperand(NamedTuple):
    """One vector's share in a tensor: ``plus − minus``, or just ``plus`` when it is stored."""

    vector: int
    """Index into the recipe's vectors."""
    plus: Operand
    minus: Operand | None


class TensorPlan(NamedTuple):
    """How one tensor of the output is made, and where it lies."""

    name: str
    dtype: str
    """Of the output."""
    shape: tuple[int, ...]
    shard: int
    """Index into ``Plan.shards``."""
    start: int
    """First byte, in the shard's file."""
    stop: int
    rule: Rule
    """``combine``: arithmetic; ``cast``: the target rounded to another dtype; ``copy``: its bytes."""
    target: Operand | None
    vectors: tuple[VectorOperand, ...]
    why: str
    """Why this rule, in words for the tables; empty for ``combine``."""
    weights: tuple[Weights, ...]
    """One an output. Of tensors with the same numbers, the same object."""

    def rule_in(self, output: int) -> tuple[Rule, str]:
        """The rule in one output, and why: where its alphas are 0 it gets the target, whatever the others get."""
        if self.rule != "combine" or self.target is None or self.weights[output].moves:
            return self.rule, self.why
        return ("copy" if self.target.dtype == self.dtype else "cast"), "alpha is 0"


class ShardPlan(NamedTuple):
    """One output file, fixed to the byte but for the tensors' values."""

    name: str
    header: bytes
    size: int
    """Bytes of the whole file."""
    first: int
    """Index of its first tensor in ``Plan.tensors``."""
    length: int
    """How many tensors it holds."""


class Piece(NamedTuple):
    """An aligned byte range of one shard: the unit of scheduling, of retry and of resume."""

    number: int
    shard: int
    start: int
    stop: int


class Span(NamedTuple):
    """The part of one tensor that lies in a piece."""

    tensor: int
    """Index into ``Plan.tensors``."""
    name: str
    dtype: str
    start: int
    """First byte of the part, counted in the tensor."""
    stop: int
    at: int
    """Where that byte lies in the output file."""
    rule: Rule
    target: Operand | None
    vectors: tuple[VectorOperand, ...]
    weights: tuple[Weights, ...]


class PieceTask(NamedTuple):
    """All that a worker needs to make one piece; it knows nothing else of the plan."""

    piece: Piece
    shard_name: str
    literal: bytes
    """Header bytes at the start of the piece; empty but in a shard's first pieces."""
    spans: tuple[Span, ...]


class PlannedInput(NamedTuple):
    """A checkpoint that the run reads, as it was when the plan was made."""

    role: str
    """target, donor, reference, vector, model or base."""
    uri: str
    fingerprint: str
    revision: str | None
    files: tuple[FileState, ...]
    """What is read of it: states are compared again before anything is published."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run will do."""

    operation: Operation
    inputs: tuple[PlannedInput, ...]
    alphas: tuple[tuple[float | None, ...], ...]
    """One tuple an output, one alpha a vector, rounded to the dtype of the arithmetic; None for one that depends on the
    tensor. `TensorPlan.weights` has what is computed with."""
    arithmetic: Arithmetic
    stats: Stats
    tensors: tuple[TensorPlan, ...]
    """In file order."""
    shards: tuple[ShardPlan, ...]
    pieces: tuple[Piece, ...]
    left_out: tuple[tuple[str, str], ...]
    """Tensors of the inputs that the output has no place for, each with the reason."""
    options: tuple[tuple[str, str], ...]
    """The options that change the output's bytes, by name, for the manifest and for resume."""

    @property
    def weighted(self) -> bool:
        """Whether what is measured as v is the weighted sum of the vectors, also where a tensor has but one of them."""
        return len(self.alphas[0]) > 1 or self.arithmetic.order != "each"

    @property
    def has_target(self) -> bool:
        """Whether outputs are a target and what is added to it."""
        return self.operation not in WITHOUT_TARGET

    @property
    def output_bytes(self) -> int:
        """Bytes of the shards of one output."""
        return sum(shard.size for shard in self.shards)

    @property
    def data_bytes(self) -> int:
        """Bytes of tensor data of one output."""
        return sum(tensor.stop - tensor.start for tensor in self.tensors)
