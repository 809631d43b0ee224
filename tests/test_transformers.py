"""The outputs load in transformers, and compute what the arithmetic says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_transformers_loads_the_output_and_finds_the_weights_of_the_formula(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoints(str(tmp_path))
    target, donor, reference = (str(tmp_path / role) for role in ("target", "donor", "reference"))
    options = rv.PlanOptions(max_shard_bytes=4_000_000)
    how = rv.RunOptions(runtime="local")
    rv.transfer(target, donor, reference, str(tmp_path / "out"), alpha=0.5, plan_options=options, run_options=how)
    rv.transfer(target, donor, reference, str(tmp_path / "same"), alpha=0.0, plan_options=options, run_options=how)

    def load(path: str) -> torch.nn.Module:
        model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        return model.eval()

    t, a, b, o = (dict(load(path).named_parameters()) for path in (target, donor, reference, str(tmp_path / "out")))
    assert len(o) == len(t) > 50
    for name, value in o.items():
        expected = (t[name].float() + 0.5 * (a[name].float() - b[name].float())).bfloat16()
        assert torch.equal(value, expected), name

    tokens = torch.arange(32)[None]
    with torch.no_grad():
        before, after, same = (
            load(path)(tokens).logits for path in (target, str(tmp_path / "out"), str(tmp_path / "same"))
        )
    assert torch.equal(before, same)
    assert not torch.equal(before, after)
