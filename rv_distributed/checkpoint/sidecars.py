"""The files beside the weights: which belong to a model, and the one edit that a new dtype needs."""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any, Final

#: Weights of other formats: copied, they would be another model's beside the new one, and a pickle runs code.
_PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".nemo", ".distcp"})
_FROM_JAX_AND_KERAS: Final = frozenset({".h5", ".hdf5", ".keras", ".msgpack", ".pb", ".tflite", ".npy", ".npz"})
_FOR_INFERENCE: Final = frozenset({".onnx", ".onnx_data", ".gguf", ".ggml", ".ot", ".mlmodel", ".pte", ".engine"})
_WEIGHT_SUFFIXES: Final = {".safetensors", ".pdparams"} | _PICKLES | _FROM_JAX_AND_KERAS | _FOR_INFERENCE
_OWN_NAMES: Final = frozenset(
    {"rv_manifest.json", "rv_tensors.parquet", "rv_pieces.parquet", "rv_recipe.yaml", "README.md"}
)
_LEFT_OUT_FOLDERS: Final = frozenset({".git", ".cache", "__pycache__"})
_QUANTIZATION_KEY: Final = "quantization_config"
_QUANTIZATION: Final = re.compile(rf'"{_QUANTIZATION_KEY}"\s*:\s*')
_COMMA: Final = re.compile(r"\s*,\s*")
_DECODER: Final = json.JSONDecoder()
_DTYPE_FIELD: Final = re.compile(rb'("(?:torch_dtype|dtype)"\s*:\s*")(?:float32|bfloat16|float16)(")')


def is_sidecar(name: str) -> bool:
    """Whether a file goes with the model into every output.

    Left out: weights of any format, their indexes and metadata, version control and caches, and the files that an
    output has of its own (model card, manifest, tables).
    """
    path = PurePosixPath(name)
    if any(part in _LEFT_OUT_FOLDERS for part in path.parts[:-1]):
        return False
    if path.suffix.lower() in _WEIGHT_SUFFIXES or name.endswith(".index.json"):
        return False
    return name not in _OWN_NAMES and path.name not in {".gitattributes", ".gitignore", ".metadata"}


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
