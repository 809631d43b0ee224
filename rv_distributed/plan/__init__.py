"""Planning: pure functions from opened checkpoints to a `Plan`. No I/O, no torch, no ray."""

from rv_distributed.checkpoint.sources import Operand, Source
from rv_distributed.plan.build import make_plan
from rv_distributed.plan.families import misfits, no_difference
from rv_distributed.plan.layout import PIECE_ALIGNMENT, WHOLE_SHARDS, cut_pieces, size_pieces, task_of
from rv_distributed.plan.model import (
    Piece,
    PieceTask,
    Plan,
    PlannedInput,
    Requantized,
    Segment,
    ShardPlan,
    Span,
    TensorPlan,
)
from rv_distributed.plan.numbers import as_numbers
from rv_distributed.plan.options import PlanOptions
from rv_distributed.plan.requantize import is_of_scales
from rv_distributed.plan.roles import role_problems, role_warnings

__all__ = [
    "PIECE_ALIGNMENT",
    "WHOLE_SHARDS",
    "Operand",
    "Piece",
    "PieceTask",
    "Plan",
    "PlanOptions",
    "PlannedInput",
    "Requantized",
    "Segment",
    "ShardPlan",
    "Source",
    "Span",
    "TensorPlan",
    "as_numbers",
    "cut_pieces",
    "is_of_scales",
    "make_plan",
    "misfits",
    "no_difference",
    "role_problems",
    "role_warnings",
    "size_pieces",
    "task_of",
]
