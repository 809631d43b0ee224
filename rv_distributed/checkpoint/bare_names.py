"""One tensor, several names: what training and saving wrap around a model, and how names look without it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from rv_distributed.checkpoint.model import Tensor

#: The modules that a language model may lie in, alone or one in the other.
_OUTER: Final = re.compile(r"(?:(?:_orig_mod|module|base_model|model|language_model|transformer)\.)+")
#: What torch.compile, FSDP and activation checkpointing put around a module anywhere.
_AROUND: Final = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: Older names of experts and the modules they are in, and the names that transformers has for them now.
_OLDER: Final = (
    (re.compile(r"\.block_sparse_moe\."), ".mlp."),
    (re.compile(r"(\.experts\.\d+)\.w1\."), r"\1.gate_proj."),
    (re.compile(r"(\.experts\.\d+)\.w3\."), r"\1.up_proj."),
    (re.compile(r"(\.experts\.\d+)\.w2\."), r"\1.down_proj."),
)
#: Buffers that some versions of a model save and others do not; they are computed from the config.
_BUFFERS: Final = re.compile(
    r"(?:.+\.)?(?:rotary_emb\.(?:inv_freq|cos_cached|sin_cached)|rotary_pos_emb\.inv_freq|rope\.freqs|masked_bias"
    r"|position_ids)"
)
#: What embeddings and heads are called in the families of transformers, and in the files of some of them. OLMo 1 has an
#: ``ff_out`` in every block, too.
_OF_VOCABULARY: Final = re.compile(
    r"(?:.+\.)?(?:embed_tokens|wte|word_embeddings?|tok_embeddings|token_embeddings?|tokens_embed|embed_in|embeddings?"
    r"|embedder|shared|(?:generator_)?lm_head(?:\.linear)?|head|embed_out|output(?:_layer|_projection)?|proj_out"
    r"|(?<!\d\.)ff_out|decoder|vocab_projector|lm_loss)\.weight"
)
_NUMBER: Final = re.compile(r"(?<![^.])\d+(?![^.])")


def bare_name(name: str) -> str:
    """The name without wrappers and in its newer spelling: alike for all names of the same tensor."""
    name = _AROUND.sub("", name)
    outer = _OUTER.match(name)
    name = name[outer.end() :] if outer else name
    if ".experts." in name or ".block_sparse_moe." in name:
        for older, newer in _OLDER:
            name = older.sub(newer, name)
    return name


def is_known_buffer(name: str) -> bool:
    """Whether a tensor may be missing without harm: a model computes it when it is loaded."""
    return _BUFFERS.fullmatch(name) is not None


def is_of_vocabulary(name: str) -> bool:
    """Whether a tensor is called as embeddings and heads are, whose rows stand for tokens."""
    return _OF_VOCABULARY.fullmatch(name) is not None


def embedding_and_head(tensors: Mapping[str, Tensor], rows: int | None) -> dict[str, Tensor]:
    """The matrices that have ``rows`` and are called so. A head for other ends may have as many rows."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and tensor.shape[0] == rows and is_of_vocabulary(name)
    }


def pattern_of(name: str) -> str:
    """The name without its numbers, which is the same for all layers and experts."""
    return _NUMBER.sub("N", name)


def renaming(name: str, other: str) -> tuple[str, str]:
    """What two names begin with before they end alike: ``model.`` and ``language_model.model.``, for instance."""
    ours, theirs = name.split("."), other.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return ".".join([*ours, ""]), ".".join([*theirs, ""])
