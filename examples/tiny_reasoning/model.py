"""A Qwen2 of 311,000 parameters in plain torch, whose checkpoints transformers loads as Qwen2ForCausalLM.

Written out so that a step of training takes little more than its arithmetic, and so that generation can drop the rows
that are finished. All rows of a batch of prompts have the same length, so nothing is padded on the left.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from problems import END, PAD, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional

HIDDEN: Final = 96
LAYERS: Final = 3
HEADS: Final = 4
KV_HEADS: Final = 2
MLP: Final = 256
POSITIONS: Final = 512
THETA: Final = 10000.0
EPSILON: Final = 1e-6
_HEAD: Final = HIDDEN // HEADS

Turn = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary embedding, each (positions, head)."""
Kept = tuple[Tensor, Tensor]
"""Keys and values of a layer, each (rows, KV heads, positions, head)."""
Cache = list[Kept]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HEADS * _HEAD)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * _HEAD)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * _HEAD)
        self.o_proj = nn.Linear(HEADS * _HEAD, HIDDEN, bias=False)

    def forward(self, x: Tensor, turn: Turn, past: Kept | None) -> tuple[Tensor, Kept]:
        rows, count, _ = x.shape
        q = _turned(self.q_proj(x).view(rows, count, HEADS, _HEAD).transpose(1, 2), turn)
        k = _turned(self.k_proj(x).view(rows, count, KV_HEADS, _HEAD).transpose(1, 2), turn)
        v = self.v_proj(x).view(rows, count, KV_HEADS, _HEAD).transpose(1, 2)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        # Each head of keys serves two heads of queries.
        every_k, every_v = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in (k, v))
        mixed = functional.scaled_dot_product_attention(q, every_k, every_v, is_causal=past is None)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, count, HIDDEN)), (k, v)


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.up_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.down_proj = nn.Linear(MLP, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Attention()
        self.mlp = _Mlp()
        self.input_layernorm = nn.RMSNorm(HIDDEN, EPSILON)
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN, EPSILON)

    def forward(self, x: Tensor, turn: Turn, past: Kept | None) -> tuple[Tensor, Kept]:
        mixed, kept = self.self_attn(self.input_layernorm(x), turn, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), kept


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(len(VOCABULARY), HIDDEN)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN, EPSILON)


class TinyQwen2(nn.Module):
    """The model; its parameters have the names of transformers' Qwen2ForCausalLM, with tied embeddings."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = _Body()
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Smaller or larger ones learned several times slower.
                nn.init.normal_(parameter, std=0.2 if "embed" in name else 0.05)
        angles = torch.arange(POSITIONS)[:, None] * THETA ** (-torch.arange(0, _HEAD, 2) / _HEAD)
        angles = torch.cat((angles, angles), -1)
        self._cos, self._sin = angles.cos(), angles.sin()

    def forward(self, tokens: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits (rows, positions, vocabulary) of the tokens that follow ``past``, and the cache with them."""
        start = past[0][0].shape[2] if past is not None else 0
        turn = self._cos[start : start + tokens.shape[1]], self._sin[start : start + tokens.shape[1]]
        x, cache = self.model.embed_tokens(tokens), []
        for number, layer in enumerate(self.model.layers):
            x, kept = layer(x, turn, past[number] if past is not None else None)
            cache.append(kept)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight), cache

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], most: int, *, temperature: float = 0.0) -> list[list[int]]:
        """What follows each prompt, up to and with the end token or ``most`` tokens; greedy at temperature 0."""
        made: list[list[int]] = [[] for _ in prompts]
        logits, cache = self(torch.tensor(prompts))
        alive = list(range(len(prompts)))
        for _ in range(most):
            last = logits[:, -1]
            if temperature == 0.0:
                chosen = last.argmax(-1)
            else:
                chosen = torch.multinomial((last / temperature).softmax(-1), 1)[:, 0]
            for row, token in zip(alive, chosen.tolist(), strict=True):
                made[row].append(token)
            going = (chosen != END).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(alive):
                alive = [alive[place] for place in going.tolist()]
                chosen, cache = chosen[going], [(k[going], v[going]) for k, v in cache]
            logits, cache = self(chosen[:, None], cache)
        return made

    def save(self, folder: Path) -> None:
        """Write a checkpoint as transformers does, in float32, with the tokenizer of the tiny language."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2))
        write_tokenizer(folder)


def _turned(x: Tensor, turn: Turn) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), with halves paired as in Llama and Qwen2."""
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


_CONFIG: Final = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": len(VOCABULARY),
    "tie_word_embeddings": True,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": EPSILON,
    "rope_theta": THETA,
    "hidden_act": "silu",
    "eos_token_id": END,
    "pad_token_id": PAD,
    "torch_dtype": "float32",
}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters: Qwen2's byte-level BPE without any merges, which transformers loads."""
    special = [
        {"id": number, "content": token, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token, number in VOCABULARY.items()
        if number in (PAD, END)
    ]
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # The one byte among these characters that byte-level BPE writes as another one.
    vocabulary = {token.replace(" ", "Ġ"): number for token, number in VOCABULARY.items()}
    document = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": bytes_only,
        "decoder": bytes_only,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    names = list(VOCABULARY)
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": names[PAD],
        "eos_token": names[END],
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
