"""Whether the inputs of a plan can be added at all, as far as config.json and the tensors' names tell: models of one
family, and not quantized, or in a way that is read. Called by `make_plan`, which raises what is found here with all
else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rv_distributed.checkpoint.adapter import is_adapter
from rv_distributed.checkpoint.dtypes import ARITHMETIC
from rv_distributed.checkpoint.fp8 import fp8_scheme, quantization_of
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.errors import Problem

_LAYERS: Final = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_REMEDIES: Final = {
    "model_type": "A vector fits models of its own family only: give inputs of one model_type.",
    "text_config.model_type": "A vector fits models of its own family only: give inputs of one model_type.",
    **dict.fromkeys(_LAYERS, "A vector fits models of its own size only: give inputs with the same layers."),
    "vocab_size": "Give inputs with the same vocabulary, or leave the tensors that have its size out with --exclude.",
}

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


def misfits(inputs: Sequence[Checkpoint], selects: Callable[[str], bool] | None) -> list[Problem]:
    """What keeps ``inputs`` from being added to each other, whatever their tensors are; ``selects`` says which
    tensors get the vectors, when not all do."""
    inputs = list({checkpoint.uri: checkpoint for checkpoint in inputs}.values())
    alone = [problem for checkpoint in inputs if (problem := _problem_of(checkpoint)) is not None]
    return alone + family_problems(inputs, selects)


def _problem_of(checkpoint: Checkpoint) -> Problem | None:
    if is_adapter(checkpoint):
        what = "is a LoRA adapter, and no model without its base"
        return Problem(checkpoint.uri, what, f"Write BASE+{checkpoint.uri}, with the folder of its base.")
    return quantization_problem(checkpoint)


def family_problems(inputs: Sequence[Checkpoint], selects: Callable[[str], bool] | None) -> list[Problem]:
    """Where model type, layer count or vocabulary differ from those of the first input that states them. Another
    vocabulary is no problem for a selection without a tensor of its size."""
    problems = []
    stated: dict[str, tuple[Checkpoint, Any]] = {}
    for checkpoint in inputs:
        for field, value in _facts(checkpoint.config).items():
            first, expected = stated.setdefault("layers" if field in _LAYERS else field, (checkpoint, value))
            if value == expected:
                continue
            if field == "vocab_size" and selects and not _has_rows(inputs, (value, expected), selects):
                continue
            what = f"has {field} {value!r:.80}, but {first.uri}/config.json has {expected!r:.80}"
            problems.append(Problem(f"{checkpoint.uri}/config.json", what, _REMEDIES[field]))
    return problems


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json states of the language model, which lies in ``text_config`` when it sees or hears too."""
    text = _text_config(config)
    facts = {"model_type": config.get("model_type"), "text_config.model_type": text.get("model_type")}
    for field in ("vocab_size", *_LAYERS):
        facts[field] = text.get(field, config.get(field))
    return {field: value for field, value in facts.items() if value is not None}


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _has_rows(inputs: Sequence[Checkpoint], sizes: tuple[Any, ...], selects: Callable[[str], bool]) -> bool:
    return any(
        selects(name) and any(size in sizes for size in tensor.shape)
        for checkpoint in inputs
        for name, tensor in checkpoint.tensors.items()
    )


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
            return Problem(f"{checkpoint.uri}/config.json", what, _remedy(method))
    for name in () if is_ordinary else checkpoint.tensors:
        for mark, method in _MARKS.items():
            if name.endswith(mark):
                what = f"belongs to quantized weights ({'gptq or awq' if method == 'gptq' else method})"
                return Problem(checkpoint.uri, what, _remedy(method), name)
    return None


def _remedy(method: str) -> str:
    converter = _CONVERTERS.get(method, "dequantize it first")
    return f"Give the model that it was made from, or {converter}."
