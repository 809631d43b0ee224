"""Small models that transformers loads, with a tokenizer of single characters, and tasks of local JSON files."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

CHARACTERS = ["<pad>", "<end>", *string.digits, *string.ascii_letters, *" .,?:=+#\n"]
OWN = ("--runtime", "local", "--batch-size", "16")


def write_model(folder: Path, seed: int, *, dtype: str = "float32", **config: Any) -> Path:
    """A Qwen2 of random weights, with tied embeddings if ``config`` says nothing else."""
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": len(CHARACTERS), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    shape = {**sizes, **tokens, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.3}
    model = Qwen2ForCausalLM(Qwen2Config(**{**shape, **config})).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    names = {"eos_token": "<end>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), **names).save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """Byte-level BPE without merges: what transformers makes of a Qwen2's tokenizer in any case."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytewise = {" ": "Ġ", "\n": "Ċ"}
    vocabulary = {bytewise.get(token, token): number for number, token in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tasks(folder: Path, items: int = 24) -> Path:
    """Two tasks over the same questions: ``tiny_choice`` of two answers, and ``tiny_text``, which generates."""
    folder.mkdir()
    names = string.ascii_uppercase
    docs = [
        {
            "question": f"{names[n % 20]} is {n % 7}. {names[n % 20 + 1]} is {names[n % 20]}+{n % 5}. Which one?",
            "answers": [str(n % 7), str((n + 3) % 7)],
            "right": n % 2,
        }
        for n in range(items)
    ]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    data: dict[str, Any] = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
    }
    common: dict[str, Any] = {**data, "test_split": "test", "doc_to_text": "{{question}}:"}
    choice: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "{{right}}",
    }
    choice |= {"target_delimiter": "", "metric_list": _mean("acc")}
    text: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_target": "{{answers[right]}}",
        "metric_list": _mean("exact_match"),
    }
    text |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}}
    for name, own in (("tiny_choice", choice), ("tiny_text", text), ("tiny_code", {**text, "unsafe_code": True})):
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **own}))
    return folder


def _mean(metric: str) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]


def choices(model: Path, docs: Sequence[dict[str, Any]]) -> list[float]:
    """Whether a model finds the right answer of each item the more likely one: by plain transformers, one at a time."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype="auto").eval()
    ids = {token: number for number, token in enumerate(CHARACTERS)}
    scores = []
    for doc in docs:
        with torch.no_grad():
            logits = loaded(torch.tensor([[ids[character] for character in f"{doc['question']}:"]])).logits[0, -1]
        likely = [logits[ids[answer]].item() for answer in doc["answers"]]
        scores.append(float(likely.index(max(likely)) == doc["right"]))
    return scores
