"""A small, complete example: three Qwen2.5-shaped checkpoints, and all three operations on them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Final, NamedTuple

from rv_distributed.api import apply, extract, transfer
from rv_distributed.checkpoint.manifest import Manifest
from rv_distributed.runtime.select import RunOptions
from rv_distributed.verification import verify

if TYPE_CHECKING:
    from torch import Generator, Tensor

ALPHA: Final = 0.7
_HIDDEN, _MLP, _LAYERS, _HEADS, _KV_HEADS, _VOCABULARY = 256, 704, 6, 4, 2, 8192


class Demo(NamedTuple):
    """What the demo made."""

    vector: Manifest
    applied: Manifest
    transferred: Manifest
    same_bytes: bool
    """Whether extract followed by apply gave the same shards as transfer."""


def run_demo(folder: str) -> Demo:
    """Make ``target``, ``reference`` and ``donor`` in ``folder``, then ``vector``, ``applied`` and
    ``transferred``, and verify the outputs. Raises FileExistsError when one of them is there already."""
    make_checkpoints(folder)
    target, reference, donor, vector, applied, transferred = (
        os.path.join(folder, name) for name in ("target", "reference", "donor", "vector", "applied", "transferred")
    )
    how = RunOptions(runtime="local")
    vector_manifest = extract(donor, reference, vector, run_options=how)
    applied_manifest = apply(target, {vector: ALPHA}, applied, run_options=how)
    transferred_manifest = transfer(target, donor, reference, transferred, alpha=ALPHA, run_options=how)
    for out in (vector, applied, transferred):
        verify(out)
    same = applied_manifest.shards == transferred_manifest.shards
    return Demo(vector_manifest, applied_manifest, transferred_manifest, same)


def make_checkpoints(folder: str) -> None:
    """Write the three inputs: the reference is the target and dense noise, as after supervised fine-tuning;
    the donor is the reference with a sparse change, as after reinforcement learning (arXiv 2505.11711)."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    target = {name: _random(shape, generator) for name, shape in _shapes().items()}
    reference = {name: (t + 2e-4 * _normal(t, generator)).bfloat16() for name, t in target.items()}
    donor = {
        name: torch.where(_normal(t, generator) > 1.0, t + 1e-2 * t.abs() + 1e-4, t.float()).bfloat16()
        for name, t in reference.items()
    }
    for role, tensors in (("target", target), ("reference", reference), ("donor", donor)):
        path = os.path.join(folder, role)
        os.makedirs(path)
        save_file(
            {name: t.bfloat16() for name, t in tensors.items()},
            os.path.join(path, "model.safetensors"),
            {"format": "pt"},
        )
        with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as file:
            json.dump(_CONFIG, file, indent=2)


_CONFIG: Final = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": _HIDDEN,
    "intermediate_size": _MLP,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "vocab_size": _VOCABULARY,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}


def _shapes() -> dict[str, tuple[int, ...]]:
    kv = _HIDDEN // _HEADS * _KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for layer in range(_LAYERS):
        block = {
            "input_layernorm.weight": (_HIDDEN,),
            "mlp.down_proj.weight": (_HIDDEN, _MLP),
            "mlp.gate_proj.weight": (_MLP, _HIDDEN),
            "mlp.up_proj.weight": (_MLP, _HIDDEN),
            "post_attention_layernorm.weight": (_HIDDEN,),
            "self_attn.k_proj.bias": (kv,),
            "self_attn.k_proj.weight": (kv, _HIDDEN),
            "self_attn.o_proj.weight": (_HIDDEN, _HIDDEN),
            "self_attn.q_proj.bias": (_HIDDEN,),
            "self_attn.q_proj.weight": (_HIDDEN, _HIDDEN),
            "self_attn.v_proj.bias": (kv,),
            "self_attn.v_proj.weight": (kv, _HIDDEN),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (_HIDDEN,)}


def _random(shape: tuple[int, ...], generator: Generator) -> Tensor:
    import torch

    return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()


def _normal(like: Tensor, generator: Generator) -> Tensor:
    import torch

    return torch.randn(like.shape, generator=generator)
