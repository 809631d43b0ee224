"""The files beside the weights: which belong to a model, and the one edit that a new dtype needs."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any, Final

from rv_distributed.checkpoint.model import Checkpoint, FileState

#: Weights of other formats: copied, they would be another model's beside the new one, and a pickle runs code.
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".nemo", ".distcp"})
_FROM_JAX_AND_KERAS: Final = frozenset({".h5", ".hdf5", ".keras", ".msgpack", ".pb", ".tflite", ".npy", ".npz"})
_FOR_INFERENCE: Final = frozenset({".onnx", ".onnx_data", ".gguf", ".ggml", ".ot", ".mlmodel", ".pte", ".engine"})
_WEIGHT_SUFFIXES: Final = {".safetensors", ".pdparams"} | _PICKLES | _FROM_JAX_AND_KERAS | _FOR_INFERENCE
#: What every output has of its own.
OWN_NAMES: Final = frozenset(
    {"rv_manifest.json", "rv_tensors.parquet", "rv_pieces.parquet", "rv_recipe.yaml", "README.md"}
)
_LEFT_OUT_FOLDERS: Final = frozenset({".git", ".cache", "__pycache__"})
#: Of the trainers of transformers, DeepSpeed, Accelerate, FSDP and verl; whole paths.
_TRAINING_STATE: Final = re.compile(
    r"(?:.*/)?(?:(?:checkpoint-|global_step_?|optimizer_)\d+/.*"
    r"|(?:optimizer|scheduler|rng_state|random_states)[^/]*\.(?:pt|pth|bin|pkl|safetensors)"
    r"|trainer_state\.json|training_args\.[^/]*|latest|latest_checkpointed_iteration\.txt|zero_to_fp32\.py)"
)
_TRAINING_LOG: Final = re.compile(
    r"(?:.*/)?(?:(?:runs|wandb|mlruns|tensorboard|swanlog|logs)/.*|events\.out\.tfevents\.[^/]*|[^/]*\.log"
    r"|trainer_log\.jsonl|training_[^/]*\.png|(?:all|train|eval|test|predict)_results\.json)"
)
_QUANTIZATION_KEY: Final = "quantization_config"
_QUANTIZATION: Final = re.compile(rf'"{_QUANTIZATION_KEY}"\s*:\s*')
_COMMA: Final = re.compile(r"\s*,\s*")
_DECODER: Final = json.JSONDecoder()
_DTYPE_FIELD: Final = re.compile(rb'("(?:torch_dtype|dtype)"\s*:\s*")(?:float32|bfloat16|float16)(")')


def why_left_out(name: str) -> str:
    """Why a file does not go with the model into every output; empty when it does.

    Left out: weights of any format, their indexes and metadata, what training needs or tells, version control and
    caches, and the files that an output has of its own (model card, manifest, tables).
    """
    path = PurePosixPath(name)
    if name in OWN_NAMES:
        return "an output has its own"
    if any(part in _LEFT_OUT_FOLDERS for part in path.parts[:-1]) or path.name in {".gitattributes", ".gitignore"}:
        return "version control or cache"
    if _TRAINING_STATE.fullmatch(name):
        return "training state"
    if _TRAINING_LOG.fullmatch(name):
        return "training log"
    is_weights = path.suffix.lower() in _WEIGHT_SUFFIXES or path.name == ".metadata"
    if is_weights or name.endswith(".index.json"):
        return "weights"
    return ""


def sidecars_of(frame: Checkpoint, giver: Checkpoint) -> tuple[tuple[Checkpoint, FileState], ...]:
    """The files that go with an output, each with the checkpoint that has it: those of ``giver``, but for the config
    and the code, which have to fit the tensors and are the frame's."""
    if giver is frame:
        return tuple((frame, file) for file in frame.sidecars)
    own = [(frame, file) for file in frame.sidecars if _describes_tensors(file.name)]
    return (*own, *((giver, file) for file in giver.sidecars if not _describes_tensors(file.name)))


def _describes_tensors(name: str) -> bool:
    return name == "config.json" or name.endswith(".py")


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json with its dtype fields set to ``dtype`` and every other byte as it was."""
    return _DTYPE_FIELD.sub(rb"\g<1>" + dtype.encode() + rb"\g<2>", config)


def without_quantization(config: bytes) -> bytes:
    """config.json without its ``quantization_config``, wherever that stands, and every other byte as it was.

    Where the text is too odd for that, the same document is written anew.
    """
    text = config.decode("utf-8-sig")
    wanted = _without_quantization(json.loads(text))
    try:
        for found in reversed(list(_QUANTIZATION.finditer(text))):
            before, (_, end) = text[: found.start()], _DECODER.raw_decode(text, found.end())
            # With its comma: the one behind it, or else the one before.
            comma = _COMMA.match(text, end)
            text = before + text[comma.end() :] if comma else before.rstrip().removesuffix(",") + text[end:]
        if json.loads(text) == wanted:
            return text.encode()
    except ValueError:
        pass
    return (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode()


def _without_quantization(document: Any) -> Any:
    if not isinstance(document, dict):
        return document
    return {key: _without_quantization(value) for key, value in document.items() if key != _QUANTIZATION_KEY}
