"""Add, subtract and transfer the weights of models too large for one GPU or one machine.

>>> import rv_distributed as rv
>>> rv.extract("models/grpo", "models/sft", "vectors/reasoning")
>>> rv.apply("models/target", {"vectors/reasoning": 0.7}, "models/out")
>>> rv.transfer("models/target", "models/grpo", "models/sft", "models/out", alpha=0.7)
"""

from rv_distributed.api import apply, extract, transfer
from rv_distributed.checkpoint.manifest import Manifest
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.errors import (
    ChangedError,
    Finding,
    InputError,
    Interrupted,
    OutputError,
    PieceError,
    Problem,
    RunError,
    RvError,
    UsageError,
    VerifyError,
    WorkerError,
)
from rv_distributed.job import Job, Progress, prepare
from rv_distributed.opening import open_checkpoint
from rv_distributed.plan import PlanOptions
from rv_distributed.recipe import Recipe, Vector
from rv_distributed.runtime.select import RunOptions
from rv_distributed.verify import verify

__version__ = "0.1.0"

__all__ = [
    "ChangedError",
    "Checkpoint",
    "Finding",
    "InputError",
    "Interrupted",
    "Job",
    "Manifest",
    "OutputError",
    "PieceError",
    "PlanOptions",
    "Problem",
    "Progress",
    "Recipe",
    "RunError",
    "RunOptions",
    "RvError",
    "Tensor",
    "UsageError",
    "Vector",
    "VerifyError",
    "WorkerError",
    "apply",
    "extract",
    "open_checkpoint",
    "prepare",
    "transfer",
    "verify",
]
