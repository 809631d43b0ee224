"""Sentences and words of a question, as all perturbations see them: English prose, or equations between names."""

from __future__ import annotations

import re
import string
from typing import Final, NamedTuple

from rv_distributed.evaluation.perturbations.words import COMPARING, FUNCTION, REFERRING

_END: Final = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
#: What a full stop does not end a sentence after: abbreviations, and initials such as J.
_ABBREVIATION: Final = re.compile(r"(?:^|[\s(])(?:Mrs?|Ms|Dr|Prof|St|Jr|Sr|vs|No|Nos|approx|[A-Z]|[a-z]\.[a-z])\.$")
_WORD: Final = re.compile(r"[A-Za-z]+")
_DEFINED: Final = re.compile(r"(?:^|(?<=[.;,!?\n])\s*|(?<=\s))([A-Z])(?= (?:is|has|equals) | ?= ?)")


class Sentence(NamedTuple):
    """A sentence, and the white space behind it."""

    text: str
    gap: str


def split(text: str) -> list[Sentence]:
    """The sentences of a text; joined again they are the text."""
    found, start, at = [], 0, 0
    while (end := _END.search(text, at)) is not None:
        at = end.end()
        if end[0] == "." and _ABBREVIATION.search(text[start:at]):
            continue
        gap = re.compile(r"\s*").match(text, at)
        after = gap.end() if gap is not None else at
        found.append(Sentence(text[start:at], text[at:after]))
        start = at = after
    return found + ([Sentence(text[start:], "")] if start < len(text) else [])


def join(sentences: list[Sentence]) -> str:
    return "".join(text + gap for text, gap in sentences)


def question_of(sentences: list[Sentence]) -> int:
    """The number of the sentence that asks: the first with a question mark, or else the last."""
    asking = (number for number, sentence in enumerate(sentences) if "?" in sentence.text)
    return next(asking, len(sentences) - 1)


def words(text: str) -> list[str]:
    """In lower case, but for single capitals, which are names."""
    return [word if len(word) == 1 and word.isupper() else word.lower() for word in _WORD.findall(text)]


def content(text: str) -> set[str]:
    """The words that say what a sentence is about."""
    return {word for word in words(text) if word not in FUNCTION and (len(word) > 2 or word.isupper())}


def refers(sentence: str) -> bool:
    """Whether a sentence leans on others: on what they tell, or on when it happened."""
    own = set(words(sentence))
    compares = bool(own & COMPARING) and not own & {"than", "as"}
    return compares or bool(own & REFERRING)


def variables(text: str) -> list[str]:
    """Single capitals that the text defines, as in ``B is E+1`` or ``x = ...``; the article A and I are none."""
    return list(dict.fromkeys(letter for letter in _DEFINED.findall(text) if letter not in "AI"))


def spare_letters(text: str) -> list[str]:
    """Single capitals that could be variables, and that the text has none of."""
    return [letter for letter in string.ascii_uppercase if letter not in "AI" and letter not in text]
