"""Sentences that do not depend on each other, in another order; what is asked stays last."""

from __future__ import annotations

import random
import re
from typing import Final

from rv_distributed.evaluation.perturbations.model import Perturbed
from rv_distributed.evaluation.perturbations.text import Sentence, content, join, question_of, refers, split

_STATES: Final = re.compile(r"([A-Z][A-Za-z]*) (?:is|are|has|have|costs?|weighs?|equals?|=) ")
_TRIES: Final = 5


def reorder(text: str, rng: random.Random) -> Perturbed:
    """The sentences before the question in a random order that keeps each pair which may depend on its order.

    Two sentences may change places when neither refers to others (by a pronoun, a word of time or a comparison without
    its other side) and they either have no word of content in common or both state how something is, each of another
    thing: ``Tom is 5 years old. Ann is twice as old as Tom.`` Sentences that tell what becomes of one thing stay.
    """
    sentences = split(text)
    asked = question_of(sentences)
    facts = [sentence.text for sentence in sentences[:asked]]
    for _ in range(_TRIES):
        order = _extension(facts, rng)
        if order != sorted(order):
            break
    # The white space stays where it was: lines and paragraphs are the text's form.
    moved = [Sentence(facts[number], sentences[place].gap) for place, number in enumerate(order)] if facts else []
    return Perturbed(join([*moved, *sentences[asked:]]))


def _extension(facts: list[str], rng: random.Random) -> list[int]:
    """A random order in which every sentence follows those that it has to."""
    before = {
        number: {other for other in range(number) if not independent(facts[other], facts[number])}
        for number in range(len(facts))
    }
    order: list[int] = []
    while len(order) < len(facts):
        ready = [number for number in before if number not in order and before[number] <= set(order)]
        order.append(rng.choice(ready))
    return order


def independent(one: str, other: str) -> bool:
    """Whether two sentences tell the same in either order, as far as their words show."""
    if refers(one) or refers(other):
        return False
    state, other_state = _STATES.match(one), _STATES.match(other)
    if state is not None and other_state is not None:
        return state[1] != other_state[1]
    return not content(one) & content(other)
