"""What a perturbation is: a pure function of a text and a random generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Perturbed(NamedTuple):
    """A question that is asked in another way, with the same answer."""

    text: str
    renamed: Mapping[str, str] = {}
    """What has another name in it, to be renamed alike wherever else the item mentions it."""


Perturbation = Callable[[str, random.Random], Perturbed]
"""Leaves the text as it is where it cannot be changed without changing the answer."""
