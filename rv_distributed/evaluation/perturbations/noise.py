"""Slips of the keyboard: letters doubled or exchanged inside ordinary words, and spaces doubled."""

from __future__ import annotations

import random
import re
from typing import Final

from rv_distributed.evaluation.perturbations.model import Perturbed
from rv_distributed.evaluation.perturbations.words import KEPT, UNIT_WORDS

RATE: Final = 0.1
_WORD: Final = re.compile(r"(?<![\w'’-])[a-z]{4,}(?![\w'’-])")
_SPACE: Final = re.compile(r"(?<=\S) (?=\S)")


def noise(text: str, rng: random.Random) -> Perturbed:
    """Every place where a slip may fall gets one with probability `RATE`, and at least one of them does.

    A word of four letters or more, all lower case, gets an inner letter doubled, or two inner letters exchanged; a
    single space is doubled. Numbers, also those in words, names, units, and words that compare stay as they are.
    """
    places = [found for found in _WORD.finditer(text) if found[0] not in KEPT | UNIT_WORDS]
    places = sorted([*places, *_SPACE.finditer(text)], key=lambda found: found.start())
    hit = [found for found in places if rng.random() < RATE]
    if places and not hit:
        hit = [rng.choice(places)]
    parts, at = [], 0
    for found in hit:
        parts += [text[at : found.start()], _slip(found[0], rng)]
        at = found.end()
    return Perturbed("".join([*parts, text[at:]]))


def _slip(word: str, rng: random.Random) -> str:
    if word == " ":
        return "  "
    unlike = [at for at in range(1, len(word) - 2) if word[at] != word[at + 1]]
    if unlike and rng.random() < 0.5:
        at = rng.choice(unlike)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    at = rng.randrange(1, len(word) - 1)
    return word[:at] + word[at] + word[at:]
