"""What config.json states of the language model. In a model that sees or hears too, that lies in ``text_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's own part; empty when there is none."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def stated(config: Mapping[str, Any], field: str) -> Any:
    """A field of the language model; None when it is not there."""
    return text_config(config).get(field, config.get(field))


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding."""
    return _count(stated(config, "vocab_size"))


def is_untied(config: Mapping[str, Any]) -> bool:
    """Whether the head has weights of its own. Unstated is not untied: what it means depends on the architecture."""
    return stated(config, "tie_word_embeddings") is False


def attention_rows(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Rows of the projections to query, key and value; None when they are not stated."""
    heads, hidden = _count(stated(config, "num_attention_heads")), _count(stated(config, "hidden_size"))
    if heads is None:
        return None
    width = _count(stated(config, "head_dim")) or (hidden // heads if hidden is not None else None)
    groups = _count(stated(config, "num_key_value_heads")) or heads
    return None if width is None else (heads * width, groups * width, groups * width)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
