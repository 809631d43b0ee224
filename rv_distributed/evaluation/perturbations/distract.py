"""One sentence more, which has nothing to do with what is asked."""

from __future__ import annotations

import random

from rv_distributed.evaluation.perturbations.model import Perturbed
from rv_distributed.evaluation.perturbations.text import (
    Sentence,
    content,
    join,
    question_of,
    refers,
    spare_letters,
    split,
    variables,
)
from rv_distributed.evaluation.perturbations.words import IRRELEVANT


def distract(text: str, rng: random.Random) -> Perturbed:
    """A sentence with a number, about something that the text does not mention, somewhere before the question.

    In a text of variables it defines one that nothing uses. It never parts a sentence from one that refers back to it.
    """
    sentences = split(text)
    places = [0] + [number for number in range(1, question_of(sentences) + 1) if not refers(sentences[number].text)]
    place = rng.choice(places)
    gap = sentences[0].gap or " "
    sentences.insert(place, Sentence(_sentence(text, rng), gap if "\n" not in gap else " "))
    return Perturbed(join(sentences))


def _sentence(text: str, rng: random.Random) -> str:
    unused = spare_letters(text)
    if variables(text) and unused:
        return f"{rng.choice(unused)} is {rng.randrange(10)}."
    about = content(text)
    apart = [sentence for sentence in IRRELEVANT if not content(sentence) & about] or list(IRRELEVANT[:1])
    return rng.choice(apart).format(rng.randrange(2, 30))
