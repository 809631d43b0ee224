"""The options that all operations share, declared once as the fields of `Common`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from rv_distributed.errors import UsageError
from rv_distributed.recipe import ComputeDType, Missing, Role, Rounding, Stats, VocabMismatch
from rv_distributed.runtime.select import DeviceName, RunOptions, RuntimeName
from rv_distributed.units import parse_bytes

if TYPE_CHECKING:
    from rv_distributed.plan import PlanOptions

Out = Annotated[str, typer.Option("--out", help="Folder or URI to make, whole or not at all.", metavar="PATH")]
LogFormat = Literal["text", "json"]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else.", envvar="RV_JSON")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.", envvar="RV_QUIET")]


@dataclass(frozen=True, slots=True)
class Running:
    """How a run is carried out, and what is told of it."""

    runtime: Annotated[
        RuntimeName,
        typer.Option(help="local: this process; ray: worker actors; auto: ray on a cluster or with several GPUs."),
    ] = "auto"
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to use; without one, ray starts on this machine.", metavar="HOST:PORT"),
    ] = None
    workers: Annotated[
        int | None, typer.Option(help="Threads (local) or actors (ray); the default is what there is.", metavar="N")
    ] = None
    cpus_per_worker: Annotated[int | None, typer.Option(help="CPUs of an actor under Ray.", metavar="N")] = None
    workers_per_node: Annotated[
        int | None, typer.Option(help="Most actors on one node of a Ray cluster.", metavar="N")
    ] = None
    node_label: Annotated[
        list[str] | None,
        typer.Option(help="Label of the Ray nodes that may get actors; may be given again.", metavar="KEY=VALUE"),
    ] = None
    device: Annotated[DeviceName, typer.Option(help="auto takes a GPU where a worker has one.")] = "auto"
    memory_budget: Annotated[
        str, typer.Option(help="Most memory for the buffers of one worker process.", metavar="SIZE")
    ] = "512MiB"
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that exists, once the new one is complete.")
    ] = False
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an unfinished run left.")] = False
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Publish an output although it holds NaN or infinity.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything but GPUs, print the plan, and stop.")] = (
        False
    )
    json: Json = False
    quiet: Quiet = False
    log_format: Annotated[
        LogFormat, typer.Option(help="Of progress and events on stderr: text, or a JSON object a line.")
    ] = "text"

    def run_options(self) -> RunOptions:
        """The options of the run. Raises UsageError."""
        return RunOptions(
            runtime=self.runtime,
            address=self.address,
            workers=self.workers,
            cpus_per_worker=self.cpus_per_worker,
            workers_per_node=self.workers_per_node,
            node_labels=dict(map(_label, self.node_label or ())),
            device=self.device,
            memory_budget_bytes=parse_bytes(self.memory_budget, "--memory-budget"),
            overwrite=self.overwrite,
            restart=self.restart,
            allow_nonfinite=self.allow_nonfinite,
        )


@dataclass(frozen=True, slots=True)
class Common(Running):
    """What every operation takes beside its checkpoints."""

    dtype: Annotated[
        str,
        typer.Option(
            help="Of the output: auto (as in the target; float32 for a vector), float32, bfloat16 or float16.",
            metavar="DTYPE",
        ),
    ] = "auto"
    max_shard_size: Annotated[str, typer.Option(help="Most tensor data in one output file.", metavar="SIZE")] = "5GB"
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Write the target's FP8 weights as FP8 again, with new scales.")
    ] = False
    include: Annotated[
        str | None, typer.Option(help="Only tensors whose name matches get the vectors.", metavar="REGEX")
    ] = None
    exclude: Annotated[
        str | None, typer.Option(help="Tensors whose name matches do not get the vectors.", metavar="REGEX")
    ] = None
    vocab_mismatch: Annotated[
        VocabMismatch,
        typer.Option(help="Of vocabularies of other sizes. overlap: the rows that all have get the vectors."),
    ] = "error"
    force_tokenizer_mismatch: Annotated[
        bool,
        typer.Option("--force-tokenizer-mismatch", help="Add rows also where tokenizers differ or cannot be compared."),
    ] = False
    missing: Annotated[
        Missing,
        typer.Option(help="Of tensors that donor or reference lacks. copy: the target's stay as they are."),
    ] = "error"
    key_mapping: Annotated[
        str | None,
        typer.Option(help="Rules, REGEX -> REPLACEMENT, that make names the target's; or JSON, YAML.", metavar="FILE"),
    ] = None
    sidecars_from: Annotated[
        Role | None,
        typer.Option(help="Input whose tokenizer, chat template, licence … go with the output; default: the target."),
    ] = None
    rounding: Annotated[
        Rounding,
        typer.Option(help="Of outputs of 16 bits. stochastic: right on average, so that alpha is not lost in it."),
    ] = "nearest"
    seed: Annotated[int, typer.Option(help="Of --rounding stochastic.", metavar="N")] = 0
    compute_dtype: Annotated[
        ComputeDType, typer.Option(help="Of the arithmetic, and of alpha: float64 for references and disputes.")
    ] = "float32"
    stats: Annotated[
        Stats,
        typer.Option(help="What is measured: full; basic leaves out what was realised of alpha; none saves time."),
    ] = "full"

    def plan_options(self) -> PlanOptions:
        """The options of the plan. Raises UsageError."""
        from rv_distributed.plan import PlanOptions
        from rv_distributed.plan.options import SHARED_OPTIONS
        from rv_distributed.small_files import read_key_mapping

        return PlanOptions(
            **{name: getattr(self, name) for name in SHARED_OPTIONS},
            max_shard_bytes=parse_bytes(self.max_shard_size, "--max-shard-size"),
            key_mapping=read_key_mapping(self.key_mapping) if self.key_mapping is not None else (),
        )


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"--node-label: {text!r} is not KEY=VALUE")
    return key, value


def with_common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, whose last parameter is ``common``, the fields of its type as options of its own.

    They are read from ``RV_OPTION`` in the environment too, whatever the command; options that only one command has,
    from ``RV_COMMAND_OPTION``.
    """
    hints = get_type_hints(command, include_extras=True)
    kind: type[Running] = hints["common"]
    shared = get_type_hints(kind, include_extras=True)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [
        parameter.replace(annotation=hints[name], kind=keyword)
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "common"
    ]
    running = {field.name for field in fields(Running)}
    added = []
    # What decides the output is shown before how it is made.
    for field in sorted(fields(kind), key=lambda field: field.name in running):
        (option,) = shared[field.name].__metadata__
        option.envvar = f"RV_{field.name.upper()}"
        added.append(inspect.Parameter(field.name, keyword, default=field.default, annotation=shared[field.name]))

    @wraps(command)
    def wrapped(**values: Any) -> None:
        common = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values, common=common)

    parameters = sorted([*own, *added], key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped
