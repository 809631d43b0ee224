"""A real model, SmolLM2-135M-Instruct: the bits, and what the model says."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from real_model import write_real_model
from reference import Raw, assert_same, combined, narrow, read_checkpoint, widen, write_checkpoint

import rv_distributed as rv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

ALPHA = 0.7
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
HOW = rv.RunOptions(runtime="local")
PLAN = rv.PlanOptions(max_shard_bytes=90_000_000)


def with_noise(tensors: dict[str, Raw], seed: int) -> dict[str, Raw]:
    rng, noisy = np.random.default_rng(seed), {}
    for name, raw in tensors.items():
        values = widen(raw)
        scale = np.float32(2e-2) * np.abs(values)
        noise = scale * rng.standard_normal(values.size, np.float32)
        noisy[name] = Raw(raw.dtype, raw.shape, narrow(values + noise, raw.dtype))
    return noisy


def answer(folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16).eval()
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    text: str = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model, two noisy twins with other shard borders, and the outputs ``out`` and ``same``, verified."""
    root = tmp_path_factory.mktemp("smollm2")
    write_real_model(root / "model")
    tensors = read_checkpoint(root / "model")
    assert len(tensors) == 272
    donor = write_checkpoint(root / "donor", with_noise(tensors, 79), shards=2, pad=3)
    twin = write_checkpoint(root / "reference", with_noise(tensors, 83))
    for name, alpha in (("out", ALPHA), ("same", 0.0)):
        out = str(root / name)
        rv.transfer(str(root / "model"), donor, twin, out, alpha=alpha, plan_options=PLAN, run_options=HOW)
        rv.verify(out)
    yield root
    shutil.rmtree(root)


def test_the_real_model_moved_along_the_vector_has_the_reference_bits(models: Path) -> None:
    t, a, b, found = (read_checkpoint(models / name) for name in ("model", "donor", "reference", "out"))
    wanted = {name: combined(raw, [(a[name], b[name])], [ALPHA]) for name, raw in t.items()}
    assert_same(found, wanted)
    assert sum(found[name] != raw for name, raw in t.items()) == len(t)


def test_the_real_model_moved_along_the_vector_loads_and_answers(models: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        str(models / "out"), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    loaded = dict(model.named_parameters())
    for name, raw in read_checkpoint(models / "out").items():
        assert loaded[name].detach().view(torch.uint8).numpy().tobytes() == raw.data, name
    assert answer(models / "out").strip()


def test_alpha_zero_gives_the_same_tensors_and_the_same_answer(models: Path) -> None:
    assert read_checkpoint(models / "same") == read_checkpoint(models / "model")
    before = answer(models / "model")
    assert "Paris" in before
    assert answer(models / "same") == before
