"""LoRA adapters as PEFT writes them, and what they add, in NumPy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from reference import Raw, widen, write_checkpoint


def write_adapter(folder: Path, factors: dict[str, tuple[Raw, Raw]], **config: object) -> Path:
    """An adapter with factors (B, A) by module."""
    tensors = {}
    for module, (b, a) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    write_checkpoint(folder, tensors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": next(iter(factors.values()))[1].shape[0], "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    return folder


def delta(factors: tuple[Raw, Raw], scale: float) -> Any:
    """``RN(scale·Σₖ b·a)``, with every product and every sum rounded to float32."""
    b, a = (widen(raw).reshape(raw.shape) for raw in factors)
    total = np.zeros((b.shape[0], a.shape[1]), np.float32)
    for k in range(a.shape[0]):
        total = total + b[:, k : k + 1] * a[k]
    return np.float32(scale) * total
