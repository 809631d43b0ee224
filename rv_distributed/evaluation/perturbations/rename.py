"""Other names for people, variables and units, the same one everywhere."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Mapping
from typing import Final

from rv_distributed.evaluation.perturbations.model import Perturbed
from rv_distributed.evaluation.perturbations.text import variables

#: Given names that questions are full of. Only these are renamed: another capitalised word may be a place, a month or
#: somebody famous, on whom the answer depends.
_GIVEN: Final = frozenset(
    "Aaron Adam Alan Albert Alice Amanda Amy Andrea Andrew Angela Anna Anne Anthony Ashley Barbara Ben Benjamin Betty "
    "Beth Bill Bob Brandon Brenda Brian Bryan Carl Carla Carlos Carol Carolyn Cathy Charles Cheryl Chris Christina "
    "Christopher Claire Cindy Daisy Daniel David Debbie Deborah Dennis Diana Donald Donna Dorothy Doug Dylan Edward "
    "Elizabeth Ella Ellen Emily Emma Eric Ethan Eugene Evelyn Frank Fred Gary George Gina Gloria Grace Greg Gregory "
    "Hannah Harold Harry Heather Helen Henry Jack Jackie Jacob Jake James Jane Janet Jason Jeff Jeffrey Jennifer Jenny "
    "Jerry Jessica Jill Jim Jimmy Joan Joe John Johnny Jonathan Jose Joseph Joshua Joyce Juan Judith Judy Julia Julie "
    "Justin Karen Kate Katherine Kathy Katie Keith Kelly Kenneth Kevin Kyle Larry Laura Lauren Lawrence Leo Linda Lisa "
    "Lucas Lucy Luke Marcus Margaret Maria Marie Mario Martha Martin Mary Matt Matthew Megan Melanie Melissa Michael "
    "Michelle Mike Monica Nancy Natalia Natalie Nathan Nicholas Nick Nicole Nina Noah Olivia Oscar Pamela Patricia Paul "
    "Pedro Peter Philip Rachel Ralph Randy Raymond Rebecca Richard Rick Robert Roger Ronald Rose Roy Ruth Ryan Samantha "
    "Samuel Sandra Sara Sarah Scott Sean Sharon Sophia Stephanie Stephen Steve Steven Susan Susie Teresa Thomas Tim "
    "Timothy Tina Toby Todd Tom Tommy Tony Tracy Tyler Victoria Vincent Virginia Walter Wendy William Zachary".split()
)
#: For he and for she.
_NEW: Final = "Alex Ariel Avery Blair Casey Dakota Eden Emery Finley Harley Jordan Kai Morgan Nikita Parker Peyton Quinn "
_NEW_NAMES: Final = (_NEW + "Reese Remy Riley Robin Rowan Sasha Shay Skyler Taylor").split()

#: By dimension: the units that may be renamed, as singular and plural, and words that say that more than one unit of it
#: is about, whose proportion matters.
_DIMENSIONS: Final = (
    (("dollar", "dollars"), ("euro", "euros"), ("$", "€", "cent", "cents", "dime", "nickel", "penny", "pennies", "buck")),
    (("mile", "miles"), ("kilometer", "kilometers"), ("km", "mph", "kmh", "kph", "meter", "meters", "foot", "feet")),
    (("pound", "pounds"), ("kilogram", "kilograms"), ("lb", "lbs", "kg", "gram", "grams", "ounce", "ounces", "ton")),
    (("gallon", "gallons"), ("liter", "liters"), ("litre", "litres", "pint", "pints", "quart", "quarts", "cup", "cups")),
    (("inch", "inches"), ("centimeter", "centimeters"), ("cm", "foot", "feet", "yard", "yards", "meter", "meters")),
)
UNIT_WORDS: Final = frozenset(word for one, other, more in _DIMENSIONS for word in (*one, *other, *more))


def rename(text: str, rng: random.Random) -> Perturbed:
    """People, variables and units of numbers get other names, each the same one everywhere.

    A given name with a surname behind it stays, as do variables that are options of a choice, (A) to (D), and units of a
    dimension of which the text has several, or a symbol: their proportion is part of the question.
    """
    given = [word for word in dict.fromkeys(re.findall(r"\b[A-Z][a-z]+\b", text)) if word in _GIVEN]
    given = [name for name in given if not re.search(rf"\b{name} [A-Z][a-z]", text)]
    spare = [name for name in _NEW_NAMES if name not in text]
    renamed = dict(zip(given, rng.sample(spare, min(len(given), len(spare))), strict=False))
    letters = variables(text)
    unused = [letter for letter in string.ascii_uppercase if letter not in "AI" and letter not in text]
    renamed |= dict(zip(letters, rng.sample(unused, min(len(letters), len(unused))), strict=False))
    for one, other, more in _DIMENSIONS:
        renamed |= _units(text, one, other, more) or _units(text, other, one, more)
    return Perturbed(renaming(text, renamed), renamed)


def _units(text: str, old: tuple[str, str], new: tuple[str, str], more: tuple[str, ...]) -> dict[str, str]:
    follows = re.search(rf"\d (?:{'|'.join(old)})\b", text)
    mixed = any(re.search(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])", text) for word in (*new, *more))
    return dict(zip(old, new, strict=True)) if follows and not mixed else {}


def renaming(text: str, renamed: Mapping[str, str]) -> str:
    """The text with every whole word that has another name under that name."""
    if not renamed:
        return text
    names = "|".join(sorted(renamed, key=len, reverse=True))
    return re.sub(rf"(?<![A-Za-z(])(?:{names})(?![A-Za-z])", lambda found: renamed[found[0]], text)
