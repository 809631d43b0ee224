"""Add, subtract and transfer the weights of models too large for one GPU or one machine.

>>> import rv_distributed as rv
>>> rv.extract("models/grpo", "models/sft", "vectors/reasoning")
>>> rv.apply("models/target", {"vectors/reasoning": 0.7}, "models/out")
>>> rv.transfer("models/target", "models/grpo", "models/sft", "models/out", alpha=0.7)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rv_distributed.api import apply, extract, push, run, transfer
    from rv_distributed.checkpoint.manifest import Manifest
    from rv_distributed.checkpoint.model import Checkpoint, Tensor
    from rv_distributed.comparison import Diff, diff
    from rv_distributed.errors import (
        Cancelled,
        ChangedError,
        Finding,
        InputError,
        Interrupted,
        NonFiniteError,
        OutputError,
        PieceError,
        Problem,
        RunError,
        RvError,
        UsageError,
        VerifyError,
        WorkerError,
    )
    from rv_distributed.evaluation import Ask, Evaluation, EvaluationOptions, Means, prepare_evaluation
    from rv_distributed.job import Job
    from rv_distributed.opening import open_checkpoint
    from rv_distributed.plan import PlanOptions
    from rv_distributed.preparing import prepare
    from rv_distributed.pushing import Pushed
    from rv_distributed.recipe import ByTensor, Choice, Recipe, Vector
    from rv_distributed.recipe_files.loaded import LoadedRecipe
    from rv_distributed.recipe_files.reading import load_recipe
    from rv_distributed.runtime.select import RunOptions
    from rv_distributed.small_files import read_key_mapping
    from rv_distributed.verification import verify, verify_against_inputs
    from rv_distributed.watching import Progress, Share

__version__ = "0.1.0"

__all__ = [
    "Ask",
    "ByTensor",
    "Cancelled",
    "ChangedError",
    "Checkpoint",
    "Choice",
    "Diff",
    "Evaluation",
    "EvaluationOptions",
    "Finding",
    "InputError",
    "Interrupted",
    "Job",
    "LoadedRecipe",
    "Manifest",
    "Means",
    "NonFiniteError",
    "OutputError",
    "PieceError",
    "PlanOptions",
    "Problem",
    "Progress",
    "Pushed",
    "Recipe",
    "RunError",
    "RunOptions",
    "RvError",
    "Share",
    "Tensor",
    "UsageError",
    "Vector",
    "VerifyError",
    "WorkerError",
    "apply",
    "diff",
    "extract",
    "load_recipe",
    "open_checkpoint",
    "prepare",
    "prepare_evaluation",
    "push",
    "read_key_mapping",
    "run",
    "transfer",
    "verify",
    "verify_against_inputs",
]

#: Where each public name is defined. They are imported at first use, so that a command that only prints its
#: help, or a worker that needs one module, does not load the others.
_HOMES = {
    "Ask": "rv_distributed.evaluation",
    "ByTensor": "rv_distributed.recipe",
    "Cancelled": "rv_distributed.errors",
    "ChangedError": "rv_distributed.errors",
    "Choice": "rv_distributed.recipe",
    "Checkpoint": "rv_distributed.checkpoint.model",
    "Evaluation": "rv_distributed.evaluation",
    "EvaluationOptions": "rv_distributed.evaluation",
    "Diff": "rv_distributed.comparison",
    "Finding": "rv_distributed.errors",
    "InputError": "rv_distributed.errors",
    "Interrupted": "rv_distributed.errors",
    "Job": "rv_distributed.job",
    "LoadedRecipe": "rv_distributed.recipe_files.loaded",
    "Manifest": "rv_distributed.checkpoint.manifest",
    "Means": "rv_distributed.evaluation",
    "NonFiniteError": "rv_distributed.errors",
    "OutputError": "rv_distributed.errors",
    "PieceError": "rv_distributed.errors",
    "PlanOptions": "rv_distributed.plan",
    "Problem": "rv_distributed.errors",
    "Progress": "rv_distributed.watching",
    "Pushed": "rv_distributed.pushing",
    "Share": "rv_distributed.watching",
    "Recipe": "rv_distributed.recipe",
    "RunError": "rv_distributed.errors",
    "RunOptions": "rv_distributed.runtime.select",
    "RvError": "rv_distributed.errors",
    "Tensor": "rv_distributed.checkpoint.model",
    "UsageError": "rv_distributed.errors",
    "Vector": "rv_distributed.recipe",
    "VerifyError": "rv_distributed.errors",
    "WorkerError": "rv_distributed.errors",
    "apply": "rv_distributed.api",
    "diff": "rv_distributed.comparison",
    "extract": "rv_distributed.api",
    "open_checkpoint": "rv_distributed.opening",
    "load_recipe": "rv_distributed.recipe_files.reading",
    "prepare": "rv_distributed.preparing",
    "prepare_evaluation": "rv_distributed.evaluation",
    "push": "rv_distributed.api",
    "read_key_mapping": "rv_distributed.small_files",
    "run": "rv_distributed.api",
    "transfer": "rv_distributed.api",
    "verify": "rv_distributed.verification",
    "verify_against_inputs": "rv_distributed.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
