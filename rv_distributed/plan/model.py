"""The plan: a pure, deterministic description of a run, and the tasks that workers get from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rv_distributed.checkpoint.dtypes import ARITHMETIC, WIDE
from rv_distributed.checkpoint.manifest import WITHOUT_TARGET
from rv_distributed.checkpoint.model import FileState
from rv_distributed.checkpoint.sources import LowRank, Source, how_decoded
from rv_distributed.recipe import Arithmetic, Operation, Stats, Weights

Rule = Literal["combine", "cast", "copy", "scale"]


class Requantized(NamedTuple):
    """How a tensor is written as FP8 again. It is a stack of matrices, and made a row of blocks at a time: a band. The
    bands follow one another in its bytes, of which each is an element."""

    rows: int
    """Of one matrix."""
    columns: int
    block: tuple[int, int]
    """Rows and columns of a block."""
    scale_dtype: str
    are_powers_of_2: bool
    scales: int = -1
    """Its scales: index into ``Plan.tensors``."""
    scales_name: str = ""
    scales_shard: str = ""
    """The file that they lie in."""
    scales_at: int = -1
    """Where in it."""

    @property
    def described(self) -> str:
        """In words for the tables."""
        return f"fp8 {self.block[0]}×{self.block[1]} with scales in {self.scale_dtype}"

    @property
    def across(self) -> int:
        """Blocks of a band."""
        return -(-self.columns // self.block[1])

    @property
    def band_bytes(self) -> int:
        """Of the largest."""
        return min(self.block[0], self.rows) * self.columns

    def band(self, byte: int) -> tuple[int, int]:
        """The first byte of the band that a byte lies in, and the one past its last."""
        matrix, row = divmod(byte // self.columns, self.rows)
        top = row // self.block[0] * self.block[0]
        above = matrix * self.rows
        return (above + top) * self.columns, (above + min(top + self.block[0], self.rows)) * self.columns

    def number(self, byte: int) -> int:
        """The number of that band, in the whole tensor."""
        matrix, row = divmod(byte // self.columns, self.rows)
        return matrix * -(-self.rows // self.block[0]) + row // self.block[0]


class VectorOperand(NamedTuple):
    """One vector's share in a tensor: ``plus − minus``, or just ``plus`` when it is stored."""

    vector: int
    """Index into the recipe's vectors."""
    plus: Source
    minus: Source | None


class Segment(NamedTuple):
    """Consecutive elements of an output's tensor that are made from the same operands."""

    stop: int
    """One past its last byte, counted in the tensor. It begins where the segment before it ends."""
    target: Source | None
    """None when a vector is extracted, and where models are summed."""
    vectors: tuple[VectorOperand, ...]
    """Empty where no vector is added."""
    weights: tuple[Weights, ...]
    """One an output, each with an alpha for each of these vectors. Of segments with the same numbers, the same
    object."""

    @property
    def sources(self) -> list[Source]:
        """All that it is made from."""
        return list(sources_of(self.target, self.vectors))

    @property
    def by_role(self) -> list[tuple[str, Source]]:
        """The same, each with what it is in the formula."""
        roles = ["target"] if self.target is not None else []
        for vector in self.vectors:
            if vector.minus is not None:
                roles += ["donor", "reference"]
            elif isinstance(vector.plus, LowRank) and vector.plus.base is None:
                roles.append("adapter")
            else:
                roles.append("vector" if self.target is not None else "model")
        return list(zip(roles, self.sources, strict=True))


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
    """``combine``: arithmetic, in some segment at least; ``cast``: the target rounded to another dtype; ``copy``: its
    bytes; ``scale``: the scales of a requantized tensor, which come out of making that."""
    segments: tuple[Segment, ...]
    """One, where sources have the whole tensor as it is; else several, in order. A requantized
    tensor's end where bands do. None for ``scale``."""
    why: str
    """Why this rule, in words for the tables; empty for ``combine``."""
    matched: str
    """How the vectors' elements were found, where not under the tensor's own name and shape."""
    requantized: Requantized | None = None
    """None for a tensor whose dtype says all."""

    @property
    def decoded(self) -> str:
        """How its sources are decoded, in words for the tables; empty where they are only read."""
        return self._of_sources(how_decoded)

    @property
    def input_dtypes(self) -> str:
        """The dtypes of its sources, in words for the tables, but for those of its own dtype and those decoded."""
        own = {self.dtype, "U8"}
        return self._of_sources(lambda of: "" if how_decoded(of) or of.dtype in own else of.dtype)

    def _of_sources(self, tell: Callable[[Source], str]) -> str:
        """What is to be told of the sources, with their roles: ``donor, reference: BF16``."""
        roles: dict[str, dict[str, None]] = {}
        for segment in self.segments:
            for role, source in segment.by_role:
                if what := tell(source):
                    roles.setdefault(what, {})[role] = None
        return "; ".join(f"{', '.join(of)}: {what}" for what, of in roles.items())

    def is_opaque_in(self, segment: Segment) -> bool:
        """Whether a segment's bytes are copied without a look at what they mean."""
        return self.requantized is None and is_opaque(self.dtype, segment.vectors)

    def rule_in(self, output: int) -> tuple[Rule, str]:
        """The rule in one output, and why: where its alphas are 0 it gets the target, whatever the others get."""
        targets = [segment.target for segment in self.segments if segment.target is not None]
        if self.rule != "combine" or not targets or any(each.weights[output].moves for each in self.segments):
            return self.rule, self.why
        return ("copy" if all(target.dtype == self.dtype for target in targets) else "cast"), "alpha is 0"


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
    """The part of one tensor's segment that lies in a piece."""

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
    target: Source | None
    vectors: tuple[VectorOperand, ...]
    weights: tuple[Weights, ...]
    requantized: Requantized | None = None

    @property
    def operands(self) -> list[Source | None]:
        """The target, and the two sources of each vector."""
        return [self.target, *(source for vector in self.vectors for source in (vector.plus, vector.minus))]

    @property
    def is_opaque(self) -> bool:
        """Whether its bytes are copied without a look at what they mean."""
        return self.requantized is None and is_opaque(self.dtype, self.vectors)

    @property
    def is_wide(self) -> bool:
        """See `is_wide`."""
        return is_wide(self.dtype, self.target, self.vectors)


def is_opaque(dtype: str, vectors: Sequence[VectorOperand]) -> bool:
    """Whether elements of ``dtype`` are only bytes, where they get these vectors."""
    return not vectors and dtype not in ARITHMETIC


def is_wide(dtype: str, target: Source | None, vectors: Sequence[VectorOperand]) -> bool:
    """Whether some elements of ``dtype`` are computed in float64, whatever the rest of the output is computed in."""
    return bool(vectors) and WIDE in (dtype, *(source.dtype for source in sources_of(target, vectors)))


def sources_of(target: Source | None, vectors: Iterable[VectorOperand]) -> Iterator[Source]:
    """All that some elements are made from."""
    if target is not None:
        yield target
    for vector in vectors:
        yield vector.plus
        if vector.minus is not None:
            yield vector.minus


class PieceTask(NamedTuple):
    """All that a worker needs to make one piece; it knows nothing else of the plan."""

    piece: Piece
    shard_name: str
    literal: bytes
    """Header bytes at the start of the piece; empty but in a shard's first pieces."""
    spans: tuple[Span, ...]
    """In file order; those of one tensor follow each other."""

    @property
    def parts(self) -> list[tuple[int, int]]:
        """The tensors that lie in the piece, each with how many of its bytes do."""
        parts: dict[int, int] = {}
        for span in self.spans:
            parts[span.tensor] = parts.get(span.tensor, 0) + span.stop - span.start
        return list(parts.items())


class PlannedInput(NamedTuple):
    """A checkpoint that the run reads, as it was when the plan was made."""

    role: str
    """target, donor, reference, vector, model or base; or adapter, of the one before it."""
    uri: str
    fingerprint: str
    revision: str | None
    files: tuple[FileState, ...]
    """What is read of it: states are compared again before anything is published."""


class PlannedSidecar(NamedTuple):
    """A small file that goes with the outputs."""

    uri: str
    """The checkpoint that has it."""
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run will do."""

    operation: Operation
    inputs: tuple[PlannedInput, ...]
    alphas: tuple[tuple[float | None, ...], ...]
    """One tuple an output, one alpha a vector, rounded to the dtype of the arithmetic; None for one that depends on the
    tensor. `Segment.weights` has what is computed with."""
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
    giver: str = ""
    """The input whose small files go with the outputs."""
    sidecars: tuple[PlannedSidecar, ...] = ()
    files_left_out: tuple[tuple[str, str], ...] = ()
    """Files of that input that do not go with the outputs, each with the reason."""
    rules: tuple[tuple[str, str], ...] = ()
    """Each rule by which tensors were matched otherwise than by name and shape, with what it did, in words."""
    warnings: tuple[str, ...] = ()
    """What was odd about how the inputs fit together but does not stop the run."""

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
