"""Other names for people, variables and units, the same one everywhere."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from rv_distributed.evaluation.perturbations.model import Perturbed
from rv_distributed.evaluation.perturbations.text import spare_letters, variables
from rv_distributed.evaluation.perturbations.words import DIMENSIONS, GIVEN_NAMES, NEW_NAMES


def rename(text: str, rng: random.Random) -> Perturbed:
    """People, variables and units of numbers get other names, each the same one everywhere.

    A given name with a surname behind it stays, as do letters that are options of a choice, (A) to (D), and units where
    the text has two of a kind, or a symbol: their proportion is part of the question.
    """
    given = [word for word in dict.fromkeys(re.findall(r"\b[A-Z][a-z]+\b", text)) if word in GIVEN_NAMES]
    given = [name for name in given if not re.search(rf"\b{name} [A-Z][a-z]", text)]
    spare = sorted(name for name in NEW_NAMES if name not in text)
    renamed = dict(zip(given, rng.sample(spare, min(len(given), len(spare))), strict=False))
    letters = variables(text)
    unused = spare_letters(text)
    renamed |= dict(zip(letters, rng.sample(unused, min(len(letters), len(unused))), strict=False))
    for one, other, more in DIMENSIONS:
        renamed |= _units(text, one, other, more) or _units(text, other, one, more)
    return Perturbed(renaming(text, renamed), renamed)


def _units(text: str, old: tuple[str, str], new: tuple[str, str], more: frozenset[str]) -> dict[str, str]:
    follows = re.search(rf"\d (?:{'|'.join(old)})\b", text)
    mixed = any(re.search(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])", text) for word in (*new, *more))
    return dict(zip(old, new, strict=True)) if follows and not mixed else {}


def renaming(text: str, renamed: Mapping[str, str]) -> str:
    """The text with every whole word that has another name under that name."""
    if not renamed:
        return text
    names = "|".join(sorted(renamed, key=len, reverse=True))
    return re.sub(rf"(?<![A-Za-z(])(?:{names})(?![A-Za-z])", lambda found: renamed[found[0]], text)
