"""A tiny Qwen3-MoE through transformers 5: saved in its two layouts, combined, loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import ROLES
from triples import ALPHA, applied, transferred

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}
State = dict[str, torch.Tensor]


def state_of(folder: Path) -> State:
    """The parameters that transformers loads, every one of which it has to find in the folder."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    return dict(model.named_parameters())


def save(folder: Path, seed: int, *, fused: bool, **more: Any) -> None:
    """``fused`` keeps the experts as transformers has them in memory; otherwise it writes one tensor an expert."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SIZES, **more)).bfloat16()
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size="60KB")


def assert_is_the_sum(found: Mapping[str, torch.Tensor], models: Path) -> None:
    t, a, b = (state_of(models / role) for role in ROLES)
    assert found.keys() == t.keys()
    assert "model.layers.0.mlp.experts.gate_up_proj" in found
    for name, value in found.items():
        expected = (t[name].float() + ALPHA * (a[name].float() - b[name].float())).bfloat16()
        assert torch.equal(value, expected), name


@pytest.mark.parametrize(
    "fused", [("target",), ("donor", "reference"), ("reference",), ("target", "donor")], ids="-".join
)
@pytest.mark.parametrize("how", [transferred, applied])
def test_what_transformers_saves_in_two_layouts_is_combined_and_loads_again(
    tmp_path: Path, fused: tuple[str, ...], how: Callable[[Path], object]
) -> None:
    for seed, role in enumerate(ROLES):
        save(tmp_path / role, seed, fused=role in fused)
    before = {path.name for path in (tmp_path / "target").iterdir()}
    how(tmp_path)
    out = tmp_path / ("out" if how is transferred else "applied")
    assert_is_the_sum(state_of(out), tmp_path)
    assert before - {path.name for path in out.iterdir()} <= {path for path in before if "safetensors" in path}


def test_the_output_answers_as_the_model_that_torch_makes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for seed, role in enumerate(ROLES):
        save(tmp_path / role, seed, fused=role == "donor")
    transferred(tmp_path)
    t, a, b = (state_of(tmp_path / role) for role in ROLES)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((t[name].float() + ALPHA * (a[name].float() - b[name].float())).bfloat16())
        tokens = torch.arange(24)[None]
        made = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
        assert torch.equal(made(tokens).logits, model(tokens).logits)


def test_tied_embeddings_saved_by_transformers_have_no_head(tmp_path: Path) -> None:
    for seed, role in enumerate(ROLES):
        save(tmp_path / role, seed, fused=role == "reference", tie_word_embeddings=True)
    found, _ = transferred(tmp_path)
    assert "lm_head.weight" not in found
    assert_is_the_sum(state_of(tmp_path / "out"), tmp_path)
