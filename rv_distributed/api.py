"""The library's functions. Each opens its inputs, plans, runs and commits; the command line calls the same.

`rv_distributed.preparing.prepare` stops before the run, with everything checked and planned.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

from rv_distributed.checkpoint.manifest import Manifest
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.errors import UsageError
from rv_distributed.plan import PlanOptions
from rv_distributed.preparing import prepare
from rv_distributed.pushing import Pushed, hub_target, push_folder
from rv_distributed.recipe import Recipe, Vector
from rv_distributed.runtime.select import RunOptions
from rv_distributed.storage import resolve_output
from rv_distributed.verification import verify
from rv_distributed.watching import ProgressCallback


def push(
    out: str, repository: str, *, public: bool = False, revision: str | None = None, create_pr: bool = False
) -> Pushed:
    """Upload a finished output with its card to the Hugging Face Hub, from where a push that was cut short had got.

    A repository that does not exist is made, private unless ``public``. Raises VerifyError when the output is not what
    its manifest says (its tensors' bytes are not read for that), UsageError for one that is not on this machine,
    OutputError when the repository cannot be written to, RunError when the upload fails.
    """
    if create_pr and revision is not None:
        raise UsageError("--create-pr opens a pull request against the main branch; give no --revision with it")
    place = hub_target(repository)
    if revision is not None:
        place = place._replace(revision=revision)
    folder = resolve_output(out)
    if is_remote(folder):
        raise UsageError(f"{folder}: only an output on this machine can be pushed; copy it to a local folder first")
    verify(folder, quick=True)
    return push_folder(folder, place, public=public, create_pr=create_pr)


def extract(
    donor: str,
    reference: str,
    out: str,
    *,
    plan_options: PlanOptions | None = None,
    run_options: RunOptions | None = None,
    progress: ProgressCallback | None = None,
    cancel: threading.Event | None = None,
) -> Manifest:
    """Write the vector ``V = A − B`` of two checkpoints, as a checkpoint of its own.

    In float32, the default, applying it gives the same bytes as `transfer`; with ``PlanOptions(dtype="bfloat16")``
    it takes half the space and the manifest counts the elements that were not exact.

    ``progress`` is called after every piece; ``cancel``, once it is set, stops the run at the next one.

    Raises UsageError, InputError and OutputError before anything is written; RunError and Cancelled, with what was
    finished kept for the next call, afterwards.
    """
    recipe = Recipe("extract", None, (Vector(donor, reference),), ((1.0,),))
    return prepare(recipe, [out], plan_options or PlanOptions(), run_options or RunOptions()).run(progress, cancel)[0]


def apply(
    target: str,
    vectors: Mapping[str, float] | Sequence[tuple[str, float]],
    out: str,
    *,
    plan_options: PlanOptions | None = None,
    run_options: RunOptions | None = None,
    progress: ProgressCallback | None = None,
    cancel: threading.Event | None = None,
) -> Manifest:
    """Write ``O = T + Σ αₖ·Vₖ`` for stored vectors, given with their alphas in the order of addition.

    Raises as `extract`.
    """
    try:
        pairs = [(uri, alpha) for uri, alpha in (vectors.items() if isinstance(vectors, Mapping) else vectors)]
    except (TypeError, ValueError):
        raise UsageError(f"vectors is {vectors!r}: give {{vector: alpha}}, or a list of (vector, alpha)") from None
    recipe = Recipe("apply", target, tuple(Vector(uri) for uri, _ in pairs), (tuple(alpha for _, alpha in pairs),))
    return prepare(recipe, [out], plan_options or PlanOptions(), run_options or RunOptions()).run(progress, cancel)[0]


def transfer(
    target: str,
    donor: str,
    reference: str,
    out: str,
    *,
    alpha: float = 1.0,
    plan_options: PlanOptions | None = None,
    run_options: RunOptions | None = None,
    progress: ProgressCallback | None = None,
    cancel: threading.Event | None = None,
) -> Manifest:
    """Write ``O = T + α·(A − B)`` in one pass over the three checkpoints, with nothing stored in between.

    Raises as `extract`.
    """
    recipe = Recipe("transfer", target, (Vector(donor, reference),), ((alpha,),))
    return prepare(recipe, [out], plan_options or PlanOptions(), run_options or RunOptions()).run(progress, cancel)[0]


def run(
    recipe: str | os.PathLike[str],
    out: str,
    *,
    run_options: RunOptions | None = None,
    progress: ProgressCallback | None = None,
    cancel: threading.Event | None = None,
) -> tuple[Manifest, ...]:
    """Make what a recipe file says, ours or mergekit's; one manifest an output.

    ``out`` holds ``{alpha}`` and ``{include}`` where the recipe sweeps over them. Raises as `extract`.
    """
    from rv_distributed.recipe_files.reading import load_recipe

    loaded = load_recipe(recipe)
    job = prepare(loaded.recipe, loaded.outs(out), loaded.plan_options, run_options or RunOptions())
    return job.run(progress, cancel)
