"""The whole road with a real model: two fine-tunings, extract, transfer, load, generate, evaluate before and after."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from real_model import write_real_model
from reference import assert_same, combined, read_checkpoint
from refusal import run_rv

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
ALPHA = 0.5
STEPS = 20
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Greece": "Athens",
    "Peru": "Lima",
    "Cuba": "Havana",
    "Norway": "Oslo",
    "Kenya": "Nairobi",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Poland": "Warsaw",
    "Ireland": "Dublin",
    "Chile": "Santiago",
}
QUESTION = "What is the capital of {}? Answer in one word."


def tuned(model: Path, folder: Path, order: int) -> None:
    """A copy that has seen the same few answers, in an order of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    learner = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(learner.parameters(), 2e-5)
    seen = list(CAPITALS.items()) * 2
    random.Random(order).shuffle(seen)
    for country, city in seen[:STEPS]:
        inputs = tokens(tokenizer)(f"{asked(tokenizer, country)}{city}{tokenizer.eos_token}")
        optimizer.zero_grad()
        learner(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    learner.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def asked(tokenizer: Any, country: str) -> str:
    turns = [{"role": "user", "content": QUESTION.format(country)}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return text


def tokens(tokenizer: Any) -> Any:
    return lambda text: tokenizer(text, return_tensors="pt", add_special_tokens=False)


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model, its two fine-tunings, the vector between them, and the model moved along it, in two ways."""
    import datasets

    root = tmp_path_factory.mktemp("smollm2")
    write_real_model(root / "target")
    for order, name in enumerate(("donor", "reference")):
        tuned(root / "target", root / name, order)
    parents = ("--donor", root / "donor", "--reference", root / "reference")
    here = ("--runtime", "local", "--alpha", str(ALPHA))
    for command in (
        ("extract", *parents, "--out", root / "vector", "--runtime", "local"),
        ("apply", "--target", root / "target", "--vector", root / "vector", "--out", root / "applied", *here),
        ("transfer", "--target", root / "target", *parents, "--out", root / "out", *here),
        ("verify", root / "out", "--against-inputs"),
    ):
        done = run_rv(*command)
        assert done.status == 0, done.stderr
    write_task(root / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root
    shutil.rmtree(root)


def write_task(folder: Path) -> None:
    """``capitals``: which of three cities is a country's; from a local JSON file."""
    folder.mkdir()
    cities = list(CAPITALS.values())
    docs = [
        {"country": country, "cities": [cities[(n + 4) % 15], city, cities[(n + 9) % 15]]}
        for n, (country, city) in enumerate(CAPITALS.items())
    ]
    (folder / "capitals.jsonl").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "capitals.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "The capital of {{country}} is",
        "doc_to_choice": "{{cities}}",
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "capitals.yaml").write_text(json.dumps(task))  # JSON is YAML


def likelihoods(folder: Path, root: Path) -> list[list[float]]:
    """The log-likelihood of each city of each item: by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto").eval()
    found = []
    for doc in map(json.loads, (root / "tasks/capitals.jsonl").read_text().splitlines()):
        start, own = tokenizer(f"The capital of {doc['country']} is")["input_ids"], []
        for city in doc["cities"]:
            more = tokenizer(f" {city}")["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([start + more])).logits[0].float().log_softmax(-1)
            own.append(sum(logs[len(start) + n - 1, token].item() for n, token in enumerate(more)))
        found.append(own)
    return found


def test_extract_and_apply_and_transfer_give_the_reference_bits(road: Path) -> None:
    t, a, b, applied, out = (
        read_checkpoint(road / name) for name in ("target", "donor", "reference", "applied", "out")
    )
    assert_same(out, {name: combined(raw, [(a[name], b[name])], [ALPHA]) for name, raw in t.items()})
    assert applied == out
    assert sum(out[name] != raw for name, raw in t.items()) > 200


def test_the_moved_model_loads_and_answers(road: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(str(road / "out"), dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(str(road / "out"))
    inputs = tokens(tokenizer)(asked(tokenizer, "France"))
    made = model.eval().generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(made, skip_special_tokens=True)


def test_rv_eval_finds_before_and_after_what_plain_transformers_finds(road: Path) -> None:
    vector = ("--vector", road / "vector", "--alpha", str(ALPHA), "--minus")
    tasks = ("--tasks", "capitals", "--task-path", road / "tasks", "--batch-size", "1", "--runtime", "local")
    for out, more in (("eval", ()), ("eval-memory", ("--in-memory",))):
        done = run_rv("eval", "--target", road / "target", *vector, *tasks, "--out", road / out, *more)
        assert done.status == 0, done.stderr
    written, moved = (pq.read_table(road / out / "rv_items.parquet").to_pylist() for out in ("eval", "eval-memory"))
    assert written == moved
    for alpha, folder in ((0.0, "target"), (ALPHA, "out"), (-1.0, "eval/models/alpha--1")):
        rows = [row for row in written if row["alpha"] == alpha]
        assert len(rows) == len(CAPITALS)
        for row, wanted in zip(rows, likelihoods(road / folder, road), strict=True):
            found = [float(log) for log, _ in json.loads(row["response"])]
            assert found == pytest.approx(wanted, abs=0.15)  # bfloat16's own noise
            assert row["score"] == float(found.index(max(found)) == 1)
    document = json.loads((road / "eval/rv_eval.json").read_bytes())
    assert [row["alpha"] for row in document["rows"]] == [0.0, -1.0, ALPHA]
    assert document["rows"][0]["accuracy"]["mean"] > 0.5, "a real model knows more capitals than chance"
