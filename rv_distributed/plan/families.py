"""Whether the inputs of a plan can be added at all, as far as config.json and the tensors' names tell: models of one
family, and not quantized, or in a way that is read. Called by `make_plan`, which raises what is found here with all
else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rv_distributed.checkpoint.adapter import is_adapter
from rv_distributed.checkpoint.config import stated, text_config, vocab_size
from rv_distributed.checkpoint.dtypes import ARITHMETIC
from rv_distributed.checkpoint.fp8 import fp8_scheme, quantization_of
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.checkpoint.vocabulary import Vocabulary, VocabularyError, parse_vocabulary
from rv_distributed.errors import Problem
from rv_distributed.plan.options import PlanOptions

_LAYERS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_REMEDIES: Final = {
    "model_type": "A vector fits models of its own family only: give inputs of one model_type.",
    "outer model_type": "A vector fits models of its own family only: give inputs of one model_type.",
    "layers": "A vector fits models of its own size only: give inputs with the same layers.",
    "vocab_size": "Give --vocab-mismatch overlap to add the rows that all inputs have, or leave the tensors that have "
    "its size out with --exclude.",
}
_TOKENS_REMEDY: Final = (
    "A row of one model is then no row of the other: leave embedding and head out with --exclude; "
    "or give --force-tokenizer-mismatch, if you know that the rows belong together."
)
_UNTOLD: Final = (
    "has no tokenizer.json, vocab.json, vocab.txt or sentencepiece's tokenizer.model to tell the tokens of rows"
)
#: Added tokens that a warning names.
_EXAMPLES: Final = 3
_UNREADABLE_REMEDY: Final = (
    "Download the file again; or give --force-tokenizer-mismatch, if you know that the tokens are the same."
)

_GPTQMODEL: Final = "dequantize it with GPTQModel (gptqmodel.utils.model_dequant.dequantize_model)"
_CONVERTERS: Final = {
    "gptq": _GPTQMODEL,
    "awq": _GPTQMODEL,
    "bitsandbytes": "dequantize it with transformers (model.dequantize(), then model.save_pretrained)",
    # Of forms that are not read: see `fp8_scheme`.
    "fp8": "dequantize it with transformers (from_pretrained with FineGrainedFP8Config(dequantize=True))",
    "mxfp4": "dequantize it with transformers (from_pretrained with Mxfp4Config(dequantize=True))",
    "compressed-tensors": "dequantize it with transformers (CompressedTensorsConfig(run_compressed=False))",
}
#: Ends of the names of tensors that only quantized weights have.
_MARKS: Final = {
    ".qweight": "gptq",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".weight_scale_inv": "fp8",
    ".weight_packed": "compressed-tensors",
}


def misfits(inputs: Sequence[Checkpoint], options: PlanOptions) -> list[Problem]:
    """What keeps ``inputs`` from being added to each other, whatever their tensors are."""
    inputs = list({checkpoint.uri: checkpoint for checkpoint in inputs}.values())
    alone = [problem for checkpoint in inputs if (problem := _problem_of(checkpoint)) is not None]
    return alone + family_problems(inputs, options)


def _problem_of(checkpoint: Checkpoint) -> Problem | None:
    if is_adapter(checkpoint):
        what = "is a LoRA adapter, and no model without its base"
        return Problem(checkpoint.uri, what, f"Write BASE+{checkpoint.uri}, with the folder of its base.")
    return quantization_problem(checkpoint)


def family_problems(inputs: Sequence[Checkpoint], options: PlanOptions) -> list[Problem]:
    """Where model type, layer count or vocabulary differ from those of the first input that states them. Another
    vocabulary is no problem where only the rows that are shared are added, or no tensor of its size is."""
    problems = []
    known: dict[str, tuple[Checkpoint, Any]] = {}
    for checkpoint in inputs:
        for kind, field, value in _facts(checkpoint.config):
            first, expected = known.setdefault(kind, (checkpoint, value))
            if value == expected:
                continue
            if kind == "vocab_size" and (
                options.vocab_mismatch == "overlap" or not _has_rows(inputs, (value, expected), options)
            ):
                continue
            what = f"has {field} {value!r:.80}, but {first.path('config.json')} has {expected!r:.80}"
            problems.append(Problem(checkpoint.path("config.json"), what, _REMEDIES[kind]))
    return problems


def _facts(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """What config.json states, each with its kind and the field's name. A language model may be added to the one in a
    model that sees or hears too."""
    inner, outer = text_config(config).get("model_type"), config.get("model_type")
    if inner is not None:
        yield "model_type", "text_config.model_type", inner
    if outer is not None:
        yield ("model_type" if inner is None else "outer model_type"), "model_type", outer
    for kind, fields in (("vocab_size", ("vocab_size",)), ("layers", _LAYERS)):
        for field in fields:
            value = stated(config, field)
            if value is not None:
                yield kind, field, value


def _has_rows(inputs: Sequence[Checkpoint], sizes: tuple[Any, ...], options: PlanOptions) -> bool:
    return not options.is_selective or any(
        options.selects(name) and any(size in sizes for size in tensor.shape)
        for checkpoint in inputs
        for name, tensor in checkpoint.tensors.items()
    )


class Tokens:
    """The tokens of checkpoints. Files of the same content are parsed once, and those that are wrong are problems."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._parsed: dict[tuple[tuple[str, bytes], ...], Vocabulary | None] = {}

    def of(self, checkpoint: Checkpoint) -> Vocabulary | None:
        """What its files tell; None when one of them is wrong."""
        files = checkpoint.tokenizer or {}
        key = tuple(files.items())
        if key not in self._parsed:
            try:
                self._parsed[key] = parse_vocabulary(files)
            except VocabularyError as error:
                self._parsed[key] = None
                self.problems.append(Problem(checkpoint.path(error.file), error.what, _UNREADABLE_REMEDY))
        return self._parsed[key]


def compared_tokenizers(frame: Checkpoint, others: Mapping[Checkpoint, bool]) -> tuple[list[Problem], list[str]]:
    """Where tokenizers do not have the frame's token for an id that both have rows for: problems, and warnings where
    only added tokens differ, most of which are reserved ones that somebody has renamed.

    ``others`` says of each whether only some of its rows are added. Then an id that is no token in one of the two
    counts too, and a tokenizer has to tell; tokenizers of equal vocabularies are compared where both do.
    """
    tokens, problems, warnings = Tokens(), dict[Problem, None](), list[str]()
    for other, overlaps in others.items():
        if None in (frame.tokenizer, other.tokenizer) or (frame.tokenizer and frame.tokenizer == other.tokenizer):
            continue
        if not overlaps and not (frame.tokenizer and other.tokenizer):
            continue
        there, here = tokens.of(frame), tokens.of(other)
        if there is None or here is None or (here.ranks and here == there):
            continue
        untold = [checkpoint.uri for checkpoint, told in ((frame, there), (other, here)) if not told.is_told]
        if untold:
            problems.update((Problem(uri, _UNTOLD, _TOKENS_REMEDY), None) for uri in untold if overlaps)
            continue
        rows = min((size for each in (frame, other) if (size := vocab_size(each.config))), default=max(here.tokens) + 1)
        differing = [number for number in _differing(here.tokens, there.tokens, overlaps=overlaps) if number < rows]
        ordinary = [number for number in differing if number not in here.added or number not in there.added]
        counted = f"than {frame.uri} for {len(differing)} of {rows} ids: "
        if ordinary:
            what = f"has other tokens {counted}{_tokens(here, there, ordinary[:1])}"
            problems[Problem(other.uri, what, _TOKENS_REMEDY)] = None
        elif differing:
            examples = _tokens(here, there, differing[:_EXAMPLES])
            warnings.append(
                f"{other.uri}: has other added tokens {counted}{examples}: these rows are added all the same"
            )
    return [*tokens.problems, *problems], warnings


def _differing(here: Mapping[int, str], there: Mapping[int, str], *, overlaps: bool) -> list[int]:
    ids = here.keys() | there.keys() if overlaps else here.keys() & there.keys()
    return sorted(number for number in ids if here.get(number) != there.get(number))


def _tokens(here: Vocabulary, there: Vocabulary, ids: Sequence[int]) -> str:
    return "; ".join(
        f"{each} is {_token(here.tokens, each)} here and {_token(there.tokens, each)} there" for each in ids
    )


def _token(tokens: Mapping[int, str], number: int) -> str:
    return f"{tokens[number]!r:.60}" if number in tokens else "no token"


def no_difference(donor: Checkpoint, reference: Checkpoint) -> Problem:
    """That two checkpoints are the same, and no vector."""
    what = f"is the donor and holds the same weights as the reference, {reference.uri}: the vector would be zero"
    return Problem(donor.uri, what, "Give two different checkpoints as --donor and --reference.")


def quantization_problem(checkpoint: Checkpoint) -> Problem | None:
    """Why a checkpoint's weights are no numbers to add to, if they are quantized."""
    # Quantized weights are never floating-point numbers of 16 or 32 bits all through.
    is_ordinary = ARITHMETIC.keys() >= checkpoint.dtypes.keys()
    stated = quantization_of(checkpoint.config)
    if fp8_scheme(checkpoint.config) is not None:
        return None
    if stated:
        unnamed = "bitsandbytes" if "load_in_4bit" in stated else "not named"
        method = str(stated.get("quant_method", unnamed)).lower()
        if method in _CONVERTERS or not is_ordinary:
            what = f"says that the weights are quantized: its quant_method is {method!r:.80}"
            return Problem(checkpoint.path("config.json"), what, _remedy(method))
    for name in () if is_ordinary else checkpoint.tensors:
        for mark, method in _MARKS.items():
            if name.endswith(mark):
                what = f"belongs to quantized weights ({'gptq or awq' if method == 'gptq' else method})"
                return Problem(checkpoint.uri, what, _remedy(method), name)
    return None


def _remedy(method: str) -> str:
    converter = _CONVERTERS.get(method, "dequantize it first")
    return f"Give the model that it was made from, or {converter}."
