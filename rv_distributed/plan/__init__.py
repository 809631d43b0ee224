"""Planning: pure functions from opened checkpoints to a `Plan`. No I/O, no torch, no ray."""

from rv_distributed.plan.build import PlanOptions, make_plan
from rv_distributed.plan.families import misfits
from rv_distributed.plan.layout import PIECE_ALIGNMENT, PIECE_BYTES, WHOLE_SHARDS, cut_pieces, task_of
from rv_distributed.plan.model import Operand, Piece, PieceTask, Plan, PlannedInput, ShardPlan, Span, TensorPlan

__all__ = [
    "PIECE_ALIGNMENT",
    "PIECE_BYTES",
    "WHOLE_SHARDS",
    "Operand",
    "Piece",
    "PieceTask",
    "Plan",
    "PlanOptions",
    "PlannedInput",
    "ShardPlan",
    "Span",
    "TensorPlan",
    "cut_pieces",
    "make_plan",
    "misfits",
    "task_of",
]
