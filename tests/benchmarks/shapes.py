"""What the benchmarks' checkpoints look like: names, dtypes and shapes of public models. Pure.

The constructors below make a `DataSet`; `data.prepare` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

_ITEM_BYTES: Final = {"BF16": 2, "F32": 4}
#: What one value of DeepSeek-V3's block-wise scales stands for: a square of this many rows and columns.
_SCALE_BLOCK: Final = 128


class Spec(NamedTuple):
    """One tensor, before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class DataSet:
    """Three checkpoints of one shape."""

    name: str
    """Folder name below the benchmarks' data."""
    tensors: tuple[Spec, ...]
    config: Mapping[str, object]
    """config.json."""
    shards: int | None = None
    """How many files; None for as few as hold 4 GB each."""
    sparse: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in one role."""
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def parameters(self) -> int:
        return sum(math.prod(spec.shape) for spec in self.tensors)


@dataclass(frozen=True, slots=True)
class Decoder:
    """The sizes of a Qwen2 model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool


DECODERS: Final = {
    "toy": Decoder(128, 320, 3, 4, 2, 1024, True),
    "qwen2.5-0.5b": Decoder(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": Decoder(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-7b": Decoder(3584, 18944, 28, 28, 4, 152064, False),
}


def decoder(family: str, layers: int | None = None) -> DataSet:
    """A model of `DECODERS`, or its first ``layers`` layers."""
    sizes = DECODERS[family]
    count = sizes.layers if layers is None else layers
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": count,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab,
        "tie_word_embeddings": sizes.tied,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    name = family if layers is None else f"{family}-{layers}-layers"
    return DataSet(name, tuple(_decoder_tensors(sizes, count)), config)


def _decoder_tensors(sizes: Decoder, layers: int) -> Iterator[Spec]:
    hidden, middle = sizes.hidden, sizes.intermediate
    kv = hidden // sizes.heads * sizes.kv_heads
    layer = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, middle),
        "mlp.gate_proj.weight": (middle, hidden),
        "mlp.up_proj.weight": (middle, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, hidden),
    }
    yield Spec("model.embed_tokens.weight", "BF16", (sizes.vocab, hidden))
    for number in range(layers):
        for name, shape in layer.items():
            yield Spec(f"model.layers.{number}.{name}", "BF16", shape)
    yield Spec("model.norm.weight", "BF16", (hidden,))
    if not sizes.tied:
        yield Spec("lm_head.weight", "BF16", (sizes.vocab, hidden))


def one_tensor(nbytes: int) -> DataSet:
    """A checkpoint that is a single tensor, of ``nbytes`` rounded down to whole rows of 8 KiB."""
    return DataSet(f"one-tensor-{nbytes}", (Spec("weight", "BF16", (nbytes // 8192, 4096)),), {})


#: With this much data in each, a shard takes 64 KiB: 60 KiB and a header of one page.
PIECE_DATA_BYTES: Final = 60 << 10


def pieces(count: int) -> DataSet:
    """``count`` tensors that become as many shards, of one piece each, with ``--max-shard-size 61440``."""
    shape = (PIECE_DATA_BYTES // 512, 256)
    return DataSet(f"pieces-{count}", tuple(Spec(f"block.{n}.weight", "BF16", shape) for n in range(count)), {})


@dataclass(frozen=True, slots=True)
class Experts:
    """The sizes of a DeepSeek-V3 model; the defaults are the real one's."""

    hidden: int = 7168
    layers: int = 61
    dense_layers: int = 3
    dense_intermediate: int = 18432
    expert_intermediate: int = 2048
    experts: int = 256
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    vocab: int = 129280
    shards: int = 163


TOY_EXPERTS: Final = Experts(128, 4, 1, 256, 64, 8, 4, 64, 32, 16, 8, 512, 5)


def deepseek(name: str = "deepseek-v3", sizes: Experts | None = None) -> DataSet:
    """DeepSeek-V3 without its prediction layer, sparse: 671B parameters in about 90,000 tensors.

    Its weights are BF16 instead of 8-bit floats, so that they can be planned; their scales are kept.
    """
    sizes = sizes or Experts()
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16"}
    return DataSet(name, tuple(_deepseek_tensors(sizes)), config, shards=sizes.shards, sparse=True)


def _deepseek_tensors(sizes: Experts) -> Iterator[Spec]:
    hidden = sizes.hidden
    yield Spec("model.embed_tokens.weight", "BF16", (sizes.vocab, hidden))
    for number in range(sizes.layers):
        layer = f"model.layers.{number}."
        yield from _attention(f"{layer}self_attn.", sizes)
        if number < sizes.dense_layers:
            yield from _mlp(f"{layer}mlp.", hidden, sizes.dense_intermediate)
        else:
            yield Spec(f"{layer}mlp.gate.weight", "BF16", (sizes.experts, hidden))
            yield Spec(f"{layer}mlp.gate.e_score_correction_bias", "F32", (sizes.experts,))
            yield from _mlp(f"{layer}mlp.shared_experts.", hidden, sizes.expert_intermediate)
            for expert in range(sizes.experts):
                yield from _mlp(f"{layer}mlp.experts.{expert}.", hidden, sizes.expert_intermediate)
        yield Spec(f"{layer}input_layernorm.weight", "BF16", (hidden,))
        yield Spec(f"{layer}post_attention_layernorm.weight", "BF16", (hidden,))
    yield Spec("model.norm.weight", "BF16", (hidden,))
    yield Spec("lm_head.weight", "BF16", (sizes.vocab, hidden))


def _attention(prefix: str, sizes: Experts) -> Iterator[Spec]:
    head = sizes.nope + sizes.rope
    yield from _scaled(f"{prefix}q_a_proj", sizes.q_rank, sizes.hidden)
    yield Spec(f"{prefix}q_a_layernorm.weight", "BF16", (sizes.q_rank,))
    yield from _scaled(f"{prefix}q_b_proj", sizes.heads * head, sizes.q_rank)
    yield from _scaled(f"{prefix}kv_a_proj_with_mqa", sizes.kv_rank + sizes.rope, sizes.hidden)
    yield Spec(f"{prefix}kv_a_layernorm.weight", "BF16", (sizes.kv_rank,))
    yield from _scaled(f"{prefix}kv_b_proj", sizes.heads * 2 * sizes.nope, sizes.kv_rank)
    yield from _scaled(f"{prefix}o_proj", sizes.hidden, sizes.heads * sizes.nope)


def _mlp(prefix: str, hidden: int, middle: int) -> Iterator[Spec]:
    yield from _scaled(f"{prefix}gate_proj", middle, hidden)
    yield from _scaled(f"{prefix}up_proj", middle, hidden)
    yield from _scaled(f"{prefix}down_proj", hidden, middle)


def _scaled(name: str, rows: int, columns: int) -> Iterator[Spec]:
    yield Spec(f"{name}.weight", "BF16", (rows, columns))
    scales = (-(-rows // _SCALE_BLOCK), -(-columns // _SCALE_BLOCK))
    yield Spec(f"{name}.weight_scale_inv", "F32", scales)
