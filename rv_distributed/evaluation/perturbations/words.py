"""The words that perturbations go by. All of it is English."""

from __future__ import annotations

from typing import Final, NamedTuple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Given names that questions are full of. Only these are renamed: another capitalised word may be a place, a month or
#: somebody famous, on whom the answer depends.
GIVEN_NAMES: Final = _words(
    """
    Aaron Adam Alan Albert Alice Amanda Amy Andrea Andrew Angela Anna Anne Anthony Ashley Barbara Ben Benjamin Betty
    Beth Bill Bob Brandon Brenda Brian Bryan Carl Carla Carlos Carol Carolyn Cathy Charles Cheryl Chris Christina
    Christopher Claire Cindy Daisy Daniel David Debbie Deborah Dennis Diana Donald Donna Dorothy Doug Dylan Edward
    Elizabeth Ella Ellen Emily Emma Eric Ethan Eugene Evelyn Frank Fred Gary George Gina Gloria Grace Greg Gregory
    Hannah Harold Harry Heather Helen Henry Jack Jackie Jacob Jake James Jane Janet Jason Jeff Jeffrey Jennifer Jenny
    Jerry Jessica Jill Jim Jimmy Joan Joe John Johnny Jonathan Jose Joseph Joshua Joyce Juan Judith Judy Julia Julie
    Justin Karen Kate Katherine Kathy Katie Keith Kelly Kenneth Kevin Kyle Larry Laura Lauren Lawrence Leo Linda Lisa
    Lucas Lucy Luke Marcus Margaret Maria Marie Mario Martha Martin Mary Matt Matthew Megan Melanie Melissa Michael
    Michelle Mike Monica Nancy Natalia Natalie Nathan Nicholas Nick Nicole Nina Noah Olivia Oscar Pamela Patricia Paul
    Pedro Peter Philip Rachel Ralph Randy Raymond Rebecca Richard Rick Robert Roger Ronald Rose Roy Ruth Ryan Samantha
    Samuel Sandra Sara Sarah Scott Sean Sharon Sophia Stephanie Stephen Steve Steven Susan Susie Teresa Thomas Tim
    Timothy Tina Toby Todd Tom Tommy Tony Tracy Tyler Victoria Vincent Virginia Walter Wendy William Zachary
    """
)

#: Given names for he and for she.
NEW_NAMES: Final = _words(
    """
    Alex Ariel Avery Blair Casey Dakota Eden Emery Finley Harley Jordan Kai Morgan Nikita Parker Peyton Quinn Reese Remy
    Riley Robin Rowan Sasha Shay Skyler Taylor
    """
)

#: Words that refer to another sentence, so that theirs has to stay where it is.
REFERRING: Final = _words(
    """
    he she it they him her them his hers its their theirs this that these those then next after before later now finally
    first second third last also too another other others same each both either neither all remaining rest left again
    still already instead however therefore so but and or because since when while if there here such former latter
    previous following above below
    """
)

#: Words that do so unless the other side of the comparison is named.
COMPARING: Final = _words(
    """
    more less fewer older younger taller shorter longer half twice double triple
    """
)

#: Words that do not say what a sentence is about.
FUNCTION: Final = _words(
    """
    a an the of to in on at by for from with as is are was were be been has have had do does did will would can could
    than not no per only just about into over under out up down one two three four five six seven eight nine ten
    """
)

#: Words that carry amounts, or that one slip turns into their opposite or into another word.
KEPT: Final = _words(
    """
    zero three four five seven eight nine eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
    twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion dozen half halves third
    thirds quarter quarters fourth fifth sixth seventh eighth ninth tenth once twice thrice double doubled triple
    tripled more less fewer least most none each every from form than then trail trial
    """
)


class Dimension(NamedTuple):
    """Units of one kind, each as singular and plural."""

    one: tuple[str, str]
    other: tuple[str, str]
    more: frozenset[str]
    """Words that say that a second unit of the kind is about, to which the first one's proportion matters."""

    @property
    def words(self) -> frozenset[str]:
        return self.more | {*self.one, *self.other}


DIMENSIONS: Final = (
    Dimension(("dollar", "dollars"), ("euro", "euros"), _words("$ € cent cents dime dimes nickel penny pennies buck")),
    Dimension(
        ("mile", "miles"), ("kilometer", "kilometers"), _words("km mph kmh kph meter meters yard yards foot feet")
    ),
    Dimension(("pound", "pounds"), ("kilogram", "kilograms"), _words("lb lbs kg gram grams ounce ounces ton tons £")),
    Dimension(
        ("gallon", "gallons"), ("liter", "liters"), _words("litre litres pint pints quart quarts cup cups milliliters")
    ),
    Dimension(
        ("inch", "inches"), ("centimeter", "centimeters"), _words("cm foot feet yard yards meter meters millimeters")
    ),
)
UNIT_WORDS: Final = frozenset(word for dimension in DIMENSIONS for word in dimension.words)

#: Sentences about nothing in particular, with a number in them.
IRRELEVANT: Final = (
    "The library across the street was built {} years ago.",
    "The nearest lighthouse has {} steps.",
    "The radio had played the same song {} times that week.",
    "The museum downtown owns {} old clocks.",
    "A storm had closed the harbor for {} days.",
    "The town's oldest oak is {} meters tall.",
    "The bridge was painted {} times last century.",
    "The newspaper printed {} letters about the weather.",
)
