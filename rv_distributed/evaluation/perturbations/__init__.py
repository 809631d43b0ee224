"""Ways to ask the same question differently, each with the same answer as before: seeded, pure functions on text.

`perturb` is the one to call. What each does, and what it leaves alone, its own docstring says. They read English prose,
and equations between single capitals; a question that they cannot change without risk to the answer stays as it is.
"""

from __future__ import annotations

import random
from typing import Final

from rv_distributed.evaluation.perturbations.distract import distract
from rv_distributed.evaluation.perturbations.model import Perturbation, Perturbed
from rv_distributed.evaluation.perturbations.noise import noise
from rv_distributed.evaluation.perturbations.rename import rename, renaming
from rv_distributed.evaluation.perturbations.reorder import reorder

__all__ = ["PERTURBATIONS", "Perturbed", "perturb", "renaming"]

PERTURBATIONS: Final[dict[str, Perturbation]] = {
    "noise": noise,
    "rename": rename,
    "reorder": reorder,
    "distract": distract,
}


def perturb(name: str, text: str, seed: int) -> Perturbed:
    """The text under a perturbation; the same for the same arguments, whatever else is perturbed."""
    return PERTURBATIONS[name](text, random.Random(f"{name} {seed} {text}"))  # noqa: S311 - no secret
