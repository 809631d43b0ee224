"""The fields of a recipe file, for pydantic: their types, what they mean, and the JSON schema that editors read."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from rv_distributed.checkpoint.key_mapping import KeyRule, flaw_of
from rv_distributed.errors import UsageError
from rv_distributed.plan import PlanOptions
from rv_distributed.recipe import ComputeDType, Missing, Operation, Role, Rounding, Stats, VocabMismatch, check_pattern
from rv_distributed.units import parse_bytes

_DEFAULTS: Final = PlanOptions()


def _no_bool(value: object) -> object:
    # To pydantic true is 1.
    if isinstance(value, bool):
        raise ValueError("is true or false, but a number is wanted")
    return value


def _regex(value: str) -> str:
    try:
        check_pattern(value)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return value


def _rules(value: dict[str, str]) -> dict[str, str]:
    for pattern, replacement in value.items():
        if flaw := flaw_of(KeyRule(pattern, replacement)):
            raise ValueError(flaw)
    return value


def _size(value: object) -> object:
    try:
        return parse_bytes(value, "a size") if isinstance(value, str) else _no_bool(value)
    except UsageError as error:
        raise ValueError(str(error)) from None


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Gradient = Annotated[list[Number], Field(min_length=1)]
Regex = Annotated[str, AfterValidator(_regex), Field(json_schema_extra={"format": "regex"})]
Size = Annotated[
    int,
    BeforeValidator(_size, json_schema_input_type=int | str),
    Field(gt=0),
]


def kind_of_alpha(value: object) -> str:
    """Which of its forms an alpha has."""
    if not isinstance(value, list):
        return "one"
    return "choices" if any(isinstance(entry, dict) for entry in value) else "several"


def _kind_of_value(value: object) -> str:
    return "several" if isinstance(value, list) else "one"


Patterns = Annotated[
    Annotated[Regex, Tag("one")] | Annotated[list[Regex], Tag("several")], Discriminator(_kind_of_value)
]
NumberOrGradient = Annotated[
    Annotated[Number, Tag("one")] | Annotated[Gradient, Tag("several")], Discriminator(_kind_of_value)
]


class Fields(BaseModel):
    """Base of all: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ChoiceFields(Fields):
    """An alpha for some tensors."""

    match: Patterns = []
    """Regular expression to find in a tensor's name, or several that all have to be found. Without: every tensor."""
    alpha: NumberOrGradient
    """A number, or several that are interpolated from the first layer to the last."""

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.match,) if isinstance(self.match, str) else tuple(self.match)


AlphaFields = Annotated[
    Annotated[Number, Tag("one")] | Annotated[Gradient, Tag("several")] | Annotated[list[ChoiceFields], Tag("choices")],
    Discriminator(kind_of_alpha),
]


class VectorFields(Fields):
    """What is added: a stored vector, the difference of two checkpoints, or, where there is no target, a model."""

    vector: str | None = None
    """A stored vector."""
    donor: str | None = None
    """Checkpoint A of A − B."""
    reference: str | None = None
    """Checkpoint B of A − B."""
    model: str | None = None
    """A model of a weighted sum of models."""
    alpha: AlphaFields | None = None
    """Scale: a number; a list of numbers, interpolated over the layers; or a list of choices, of which the first that
    fits a tensor decides, and 0 where none does. Without: 1, or what `sweep` says."""

    @model_validator(mode="after")
    def _check(self) -> VectorFields:
        given = {name for name in ("vector", "donor", "reference", "model") if getattr(self, name) is not None}
        if given not in ({"vector"}, {"donor", "reference"}, {"model"}):
            raise ValueError("give a vector, or a donor and a reference, or a model")
        return self


class SweepFields(Fields):
    """Several outputs in one pass: one for each alpha and each selection."""

    alpha: Annotated[list[Number], Field(min_length=1)] | None = None
    """Of all vectors that state none; goes for `{alpha}` in --out."""
    include: Annotated[dict[str, Regex], Field(min_length=1)] | None = None
    """Names of selections, which go for `{include}` in --out, each with a regular expression: only tensors whose name
    it finds get the vectors."""


class RecipeFields(Fields):
    """A recipe of rv: what to compute, and how it is rounded."""

    model_config = ConfigDict(
        title="rv recipe", json_schema_extra={"$schema": "https://json-schema.org/draft/2020-12/schema"}
    )

    operation: Operation | None = None
    """Follows from the other fields, but for task_arithmetic, which adds up the vectors before it adds them to the
    target, and may normalize and scale their sum."""
    target: str | None = None
    """The model that receives the vectors. Without: a vector is extracted, or models are summed."""
    base: str | None = None
    """Of a sum of models: which gives names, order and small files, if not the first one."""
    vectors: Annotated[list[VectorFields], Field(min_length=1)]
    """In the order in which they are added."""
    normalize: bool = False
    """Divide the vectors' sum by the sum of their alphas. With task_arithmetic and linear only, as `scale`."""
    scale: AlphaFields = 1.0
    """Factor of the vectors' sum."""
    sweep: SweepFields | None = None
    """Makes several outputs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the output; auto: as in the target, and float32 for a vector."""
    max_shard_size: Size = _DEFAULTS.max_shard_bytes
    """Most tensor data in one output file, for instance 5GB."""
    include: Regex | None = None
    """Regular expression: only tensors whose name it finds get the vectors."""
    exclude: Regex | None = None
    """Regular expression: tensors whose name it finds do not get the vectors."""
    vocab_mismatch: VocabMismatch = _DEFAULTS.vocab_mismatch
    """Of vocabularies of other sizes; overlap: the rows that all have get the vectors."""
    force_tokenizer_mismatch: bool = _DEFAULTS.force_tokenizer_mismatch
    """Add rows also where tokenizers differ or cannot be compared."""
    missing: Missing = _DEFAULTS.missing
    """Of tensors that donor or reference lacks; copy: the target's stay as they are."""
    key_mapping: Annotated[dict[Regex, str], AfterValidator(_rules)] = {}
    """Regular expressions and what takes their place in the names of all inputs but the target, in this order."""
    sidecars_from: Role | None = _DEFAULTS.sidecars_from
    """Input whose tokenizer, chat template, licence and so on go with the output. Without: the target."""
    rounding: Rounding = _DEFAULTS.rounding
    """To outputs of 16 bits."""
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = _DEFAULTS.seed
    """Of stochastic rounding."""
    compute_dtype: ComputeDType = _DEFAULTS.compute_dtype
    """Of the arithmetic."""
    stats: Stats = _DEFAULTS.stats
    """What is measured."""
    requantize: bool = _DEFAULTS.requantize
    """Write the target's FP8 weights as FP8 again, with new scales."""


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipe files."""
    return RecipeFields.model_json_schema()
