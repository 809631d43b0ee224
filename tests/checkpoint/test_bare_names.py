"""Names without what is wrapped around them, and tensors taken apart: by name and shape alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rv_distributed.checkpoint.bare_names import bare_name, is_known_buffer, is_of_vocabulary, pattern_of, renaming
from rv_distributed.checkpoint.model import Tensor
from rv_distributed.plan.layouts import Part, is_transposed, parts_of


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("language_model.model.layers.0.x", "layers.0.x"),
        ("model.language_model.layers.0.x", "layers.0.x"),
        ("_orig_mod.module.base_model.model.model.layers.0.x", "layers.0.x"),
        ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.layers.3._orig_mod.self_attn._fsdp_wrapped_module.q_proj.weight", "layers.3.self_attn.q_proj.weight"),
        ("_fsdp_wrapped_module.model.layers.3._checkpoint_wrapped_module.mlp.x", "layers.3.mlp.x"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "layers.0.mlp.experts.7.gate_proj.weight"),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", "layers.0.mlp.experts.7.down_proj.weight"),
        ("model.layers.0.block_sparse_moe.experts.7.w3.weight", "layers.0.mlp.experts.7.up_proj.weight"),
        ("model.layers.0.block_sparse_moe.gate.weight", "layers.0.mlp.gate.weight"),
        ("model.layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w1.weight"),
        ("model", "model"),
        ("modeling.x", "modeling.x"),
        ("visual.model.x", "visual.model.x"),
        ("my_model.x", "my_model.x"),
    ],
)
def test_wrappers_and_older_names_are_taken_off(name: str, bare: str) -> None:
    assert bare_name(name) == bare
    assert bare_name(bare) == bare


@given(st.text(alphabet="model.layers_7", max_size=30))
def test_a_bare_name_stays_as_it_is(name: str) -> None:
    assert bare_name(bare_name(name)) == bare_name(name)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.10.mlp.experts.255.up_proj.weight", "model.layers.N.mlp.experts.N.up_proj.weight"),
        ("0.weight", "N.weight"),
        ("blocks.7", "blocks.N"),
        ("layer1.conv2.weight", "layer1.conv2.weight"),
    ],
)
def test_a_pattern_has_no_numbers(name: str, pattern: str) -> None:
    assert pattern_of(name) == pattern


@pytest.mark.parametrize(
    ("name", "other", "begin"),
    [
        ("model.norm.weight", "norm.weight", ("model.", "")),
        ("model.norm.weight", "model.language_model.norm.weight", ("model.", "model.language_model.")),
        ("a.b", "a.b", ("", "")),
        ("a.x", "b.y", ("a.x.", "b.y.")),
    ],
)
def test_the_difference_of_two_names_is_how_they_begin(name: str, other: str, begin: tuple[str, str]) -> None:
    assert renaming(name, other) == begin


def test_buffers_are_known_by_their_whole_names() -> None:
    assert is_known_buffer("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert is_known_buffer("rope.freqs")
    assert not is_known_buffer("model.layers.0.self_attn.rotary_emb.inv_freq_scale")
    assert not is_known_buffer("my_rope.freqs")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("model.embed_tokens.weight", True),
        ("backbone.embedding.weight", True),
        ("transformer.embedding.word_embeddings.weight", True),
        ("text_model.embeddings.token_embedding.weight", True),
        ("token_embeddings.weight", True),
        ("embedder.weight", True),
        ("lm_head.weight", True),
        ("lm_head.linear.weight", True),
        ("model.transformer.ff_out.weight", True),
        ("ff_out.weight", True),
        ("model.transformer.blocks.0.ff_out.weight", False),
        ("model.transformer.block_groups.1.12.ff_out.weight", False),
        ("model.layers.0.linear.weight", False),
        ("model.position_embedding.weight", False),
        ("lm_head.linear.bias", False),
    ],
)
def test_embeddings_and_heads_are_known_by_what_they_are_called(name: str, is_one: bool) -> None:
    assert is_of_vocabulary(name) == is_one


LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 12}


@pytest.mark.parametrize(
    ("name", "shape", "config", "parts"),
    [
        (
            "layers.0.mlp.experts.gate_up_proj",
            (2, 6, 5),
            {},
            [(f"layers.0.mlp.experts.{n}.{part}_proj.weight", (3, 5)) for n in (0, 1) for part in ("gate", "up")],
        ),
        ("experts.down_proj", (2, 6, 5), {}, [(f"experts.{n}.down_proj.weight", (6, 5)) for n in (0, 1)]),
        ("a.gate_up_proj.weight", (6, 5), {}, [("a.gate_proj.weight", (3, 5)), ("a.up_proj.weight", (3, 5))]),
        ("a.gate_up_proj.bias", (6,), {}, [("a.gate_proj.bias", (3,)), ("a.up_proj.bias", (3,))]),
        (
            "a.qkv_proj.weight",
            (24, 5),
            LLAMA,
            [("a.q_proj.weight", (12, 5)), ("a.k_proj.weight", (6, 5)), ("a.v_proj.weight", (6, 5))],
        ),
        (
            "a.qkv_proj.weight",
            (40, 5),
            {"text_config": LLAMA | {"head_dim": 5}},
            [("a.q_proj.weight", (20, 5)), ("a.k_proj.weight", (10, 5)), ("a.v_proj.weight", (10, 5))],
        ),
        (
            "a.qkv_proj.bias",
            (36,),
            {"num_attention_heads": 4, "hidden_size": 12},
            [(f"a.{part}_proj.bias", (12,)) for part in "qkv"],
        ),
    ],
)
def test_a_fused_tensor_is_its_parts_in_order(
    name: str, shape: tuple[int, ...], config: dict[str, Any], parts: list[tuple[str, tuple[int, ...]]]
) -> None:
    assert list(parts_of(name, shape, config)) == [Part(*part) for part in parts]


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        ("layers.0.mlp.shared_experts.gate_up_proj", (2, 6, 5), {}),
        ("layers.0.mlp.my_experts.down_proj", (2, 6, 5), {}),
        ("layers.0.mlp.experts.0.down_proj.weight", (6, 5), {}),
        ("experts.gate_up_proj", (2, 7, 5), {}),
        ("experts.gate_up_proj", (12, 5), {}),
        ("experts.gate_up_proj_bias", (2, 6), {}),
        ("experts.gate_up_proj", (0, 6, 5), {}),
        ("experts.gate_up_proj", (1 << 40, 6, 0), {}),
        ("a.gate_up_proj.weight", (7, 5), {}),
        ("a.gate_up_proj.weight", (), {}),
        ("a.gate_up_proj.scale", (6, 5), {}),
        ("a.qkv_proj.weight", (24, 5), {}),
        ("a.qkv_proj.weight", (23, 5), LLAMA),
        ("a.qkv_proj.weight", (24, 5), LLAMA | {"num_attention_heads": "4"}),
        ("a.qkv_proj.weight", (24, 5), LLAMA | {"num_attention_heads": True}),
        ("a.query_key_value.weight", (24, 5), LLAMA),
    ],
)
def test_what_is_not_fused_or_has_unknown_sizes_is_one_part(
    name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> None:
    assert parts_of(name, shape, config) == (Part(name, shape),)


@pytest.mark.parametrize(
    ("up", "down", "transposed"),
    [
        ((2, 16, 16), (2, 16, 8), False),
        ((2, 16, 16), (2, 8, 16), True),
        ((2, 6, 5), (2, 5, 3), False),
        ((2, 5, 6), (2, 3, 5), True),
        ((2, 5, 6), None, False),
    ],
)
def test_up_and_down_together_tell_whether_experts_are_transposed(
    up: tuple[int, ...], down: tuple[int, ...] | None, transposed: bool
) -> None:
    shapes = {"m.experts.gate_up_proj": up} | ({"m.experts.down_proj": down} if down else {})
    tensors = {name: Tensor("BF16", shape, "x", 0, 0) for name, shape in shapes.items()}
    assert is_transposed("m.experts.gate_up_proj", tensors) == transposed
    assert is_transposed("m.experts.down_proj", tensors) == transposed
