"""Slips of the keyboard: letters doubled or exchanged inside ordinary words, and spaces doubled."""

from __future__ import annotations

import random
import re
from typing import Final

from rv_distributed.evaluation.perturbations.model import Perturbed
from rv_distributed.evaluation.perturbations.rename import UNIT_WORDS

RATE: Final = 0.1
_WORD: Final = re.compile(r"(?<![\w'’-])[a-z]{4,}(?![\w'’-])")
_SPACE: Final = re.compile(r"(?<=\S) (?=\S)")
#: Words that carry amounts, or that one slip turns into their opposite or into another word.
_KEPT: Final = frozenset(
    "zero three four five seven eight nine eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen "
    "twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half halves third "
    "thirds quarter quarters fourth fifth sixth seventh eighth ninth tenth once twice thrice double doubled triple "
    "tripled more less fewer least most none each every from form than then trail trial".split()
)


def noise(text: str, rng: random.Random) -> Perturbed:
    """Every place where a slip may fall gets one with probability `RATE`, and at least one of them does.

    A word of four letters or more, all lower case, gets an inner letter doubled, or two inner letters exchanged; a
    single space is doubled. Numbers, also those in words, names, units, and words that compare stay as they are.
    """
    places = [found for found in _WORD.finditer(text) if found[0] not in _KEPT and found[0] not in UNIT_WORDS]
    places = sorted([*places, *_SPACE.finditer(text)], key=lambda found: found.start())
    hit = [found for found in places if rng.random() < RATE] or places[:1] and [rng.choice(places)]
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
