"""The words of an evaluation: what is asked, of which models, and what came of it. All of it crosses processes."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from rv_distributed.plan import Plan
from rv_distributed.recipe import show_alpha

Backend = Literal["hf", "vllm"]

#: The consent to run code that a model wrote, as the library reads it that the harness runs it with.
CONSENT_VARIABLE: Final = "HF_ALLOW_CODE_EVAL"


@dataclass(frozen=True, slots=True)
class Ask:
    """A task, and how it is asked. Whatever is None or empty is as the task itself says."""

    task: str
    """A task, group or tag of the harness."""
    perturbation: str | None = None
    """How its questions are perturbed; None for as they are."""
    seed: int = 0
    """Of the perturbation."""
    field: str | None = None
    """The field of an item that holds its question; None to find it."""
    limit: int | None = None
    """Only the first so many items of each of its tasks."""
    num_fewshot: int | None = None
    gen_kwargs: str = ""
    """Of the generation, as ``key=value,…``, over those of the task."""
    metric: str = ""
    """The score of an item: ``METRIC`` or ``METRIC,FILTER``; empty for the task's first."""
    apply_chat_template: bool = False

    @property
    def label(self) -> str:
        return self.task if self.perturbation is None else f"{self.task} + {self.perturbation}"


@dataclass(frozen=True, slots=True)
class Means:
    """With what a model is run. Nothing here is meant to change an answer."""

    backend: Backend = "hf"
    """hf: transformers; vllm: vLLM, which has to be installed."""
    batch_size: str = "8"
    """A number, or auto."""
    model_args: str = ""
    """Of the harness's model, as ``key=value,…``."""
    device: str = "auto"
    """auto: a GPU if there is one."""
    task_paths: tuple[str, ...] = ()
    """Folders with tasks of one's own."""
    run_unsafe_code: bool = False
    """The consent that the harness wants before it runs code that a model wrote."""
    shows_progress: bool = False
    """Whether the harness's own progress bars are wanted, on stderr."""


class Variant(NamedTuple):
    """A model: the target, or the target moved along the vector."""

    alpha: float
    folder: str
    """Of its checkpoint, or of the target's where it is made in memory."""
    identity: str
    """A digest of all that decides its weights."""
    plan: Plan | None = None
    """Of the move, where it is made in memory."""

    @property
    def label(self) -> str:
        return show_variant(self.alpha)


def show_variant(alpha: float) -> str:
    """``target``, ``target + 0.5·v``, ``target − v``."""
    if alpha == 0.0:
        return "target"
    scale = "" if abs(alpha) == 1.0 else f"{show_alpha(abs(alpha))}·"
    return f"target {'−' if alpha < 0 else '+'} {scale}v"


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One model and one task: the unit of scheduling, of failure and of resume."""

    variant: Variant
    ask: Ask
    identity: str
    """A digest of all that decides the answers, as far as it is known before."""

    @property
    def label(self) -> str:
        return f"{self.ask.label}, {self.variant.label}"


class Item(NamedTuple):
    """What a model answered to one item."""

    task: str
    """Of the items of a group, the one that it belongs to."""
    item: int
    """Its number in the task."""
    prompt: str
    wanted: str
    response: str
    """As it was generated; of a choice, the log-likelihoods."""
    answer: str
    """What the task's filter made of it."""
    score: float
    perturbed: bool
    """Whether the perturbation changed the question."""


class Answers(NamedTuple):
    """What a model answered to a task."""

    metric: str
    """``METRIC,FILTER`` of the scores."""
    items: tuple[Item, ...]
    harness: Mapping[str, Any]
    """The harness's own aggregates, task by task."""
    seconds: float


class Failed(NamedTuple):
    """A pair that could not be evaluated."""

    pair: str
    cause: str


Results = Generator[tuple[Pair, Answers | Failed], None, None]
"""What comes of pairs, one by one; closing it ends those that are not finished."""
