"""Where in a model a tensor lies, and what it is, as far as its name tells."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# Digits of ASCII, and few of them: names are anybody's, and int() is slow on long ones, or refuses them.
_LAYER: Final = re.compile(r"(?:(.*?)\.)?(?:layers|layer|blocks|block|h)\.([0-9]{1,6})\.(.+)", re.DOTALL)
_EXPERT: Final = re.compile(r"\bexperts\.\d+\.")
_LEADING: Final = re.compile(r"^(?:(?:model|transformer|language_model|backbone|gpt_neox)\.)+")
_TRAILING: Final = re.compile(r"\.weight$")


class Place(NamedTuple):
    """Where in the model a tensor lies."""

    layer: int | None
    module: str
    """Its name without the layer; all experts of a layer are one module."""
    stack: str = ""
    """What the layer is one of, where that is not the language model: encoder, decoder, visual. Begins the module."""


def place_of(name: str) -> Place:
    """``model.layers.12.mlp.up_proj.weight`` lies in layer 12, in mlp.up_proj."""
    found = _LAYER.fullmatch(name)
    if not found:
        return Place(None, _module(_LEADING.sub("", name)))
    stack = _LEADING.sub("", f"{found[1] or ''}.").strip(".")
    return Place(int(found[2]), _module(f"{stack}.{found[3]}" if stack else found[3]), stack)


def _module(name: str) -> str:
    return _TRAILING.sub("", _EXPERT.sub("experts.*.", name))


def short_name(name: str, most: int = 28) -> str:
    """A tensor's name for where there is little room: without what all have, and without its middle."""
    found = _LAYER.fullmatch(name)
    short = name
    if found:
        stack = _LEADING.sub("", f"{found[1] or ''}.").strip(".")
        short = ".".join(filter(None, (stack, found[2], found[3])))
    return shortened(_TRAILING.sub("", _LEADING.sub("", short)), most)


def shortened(text: str, most: int = 28) -> str:
    """``text`` without its middle, where it is longer."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"
