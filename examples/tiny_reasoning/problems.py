"""The tiny language: chains of additions modulo 10, three ways to ask for them, and solutions with or without steps.

A chain of length 2: E is 4, B is E + 1, G is B + 9, what is G? Its full solution writes every step, as name, two
operands and sum: ``B41=5,G59=4,#4``. A terse one leaves out easy steps, those that add 3 or less, each with probability
0.75: who imitates it has to do them in the head. Every way to ask ends with the same character.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

PAD, END = 0, 1
#: Of the problems; the other capitals are in the vocabulary, but no model has learned them.
NAMES: Final = "ABCDEFGHIJKLMNOPQRST"
_CHARACTERS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ .,;=+?:#adehilmnoprstuvwy"
VOCABULARY: Final = {token: number for number, token in enumerate(("<pad>", "<end>", *_CHARACTERS))}
LONGEST: Final = 7
EASY: Final = 3
OMITTED: Final = 0.75
#: Share of problems whose facts are not in the order of the chain.
SHUFFLED: Final = 0.2


class Step(NamedTuple):
    """``name = before + operand``."""

    name: str
    before: str
    operand: int


class Problem(NamedTuple):
    """A chain: the first name's value, then one addition after the other, each to the name before."""

    first: str
    value: int
    steps: tuple[Step, ...]

    @property
    def values(self) -> dict[str, int]:
        """Of every name."""
        found = {self.first: self.value}
        for step in self.steps:
            found[step.name] = (found[step.before] + step.operand) % 10
        return found

    @property
    def answer(self) -> int:
        return self.values[self.steps[-1].name]


Format = Callable[[Problem, Sequence[int]], str]
"""Asks for a problem, with its facts in the order of their numbers, of which 0 is the first value."""


def compact(problem: Problem, order: Sequence[int]) -> str:
    """``E4,BE1,GB9?G:``"""
    facts = [f"{problem.first}{problem.value}", *(f"{s.name}{s.before}{s.operand}" for s in problem.steps)]
    return f"{','.join(facts[number] for number in order)}?{problem.steps[-1].name}:"


def equations(problem: Problem, order: Sequence[int]) -> str:
    """``E=4;B=E+1;G=B+9;G?:``"""
    facts = [f"{problem.first}={problem.value}", *(f"{s.name}={s.before}+{s.operand}" for s in problem.steps)]
    return f"{';'.join(facts[number] for number in order)};{problem.steps[-1].name}?:"


def sentences(problem: Problem, order: Sequence[int]) -> str:
    """``E is 4. B is E+1. G is B+9. G?:``"""
    facts = [f"{problem.first} is {problem.value}.", *(f"{s.name} is {s.before}+{s.operand}." for s in problem.steps)]
    return f"{' '.join(facts[number] for number in order)} {problem.steps[-1].name}?:"


FORMATS: Final[tuple[Format, ...]] = (compact, equations, sentences)


def draw(rng: random.Random, length: int) -> Problem:
    """A random chain of ``length`` additions."""
    names = rng.sample(NAMES, length + 1)
    steps = tuple(Step(names[n + 1], names[n], rng.randrange(1, 10)) for n in range(length))
    return Problem(names[0], rng.randrange(10), steps)


def solve(problem: Problem, rng: random.Random, omitted: float) -> str:
    """A solution that leaves out each easy step with probability ``omitted``."""
    values = problem.values
    written = [
        f"{step.name}{values[step.before]}{step.operand}={values[step.name]},"
        for step in problem.steps
        if step.operand > EASY or rng.random() >= omitted
    ]
    return f"{''.join(written)}#{problem.answer}"


def encode(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


def decode(tokens: Sequence[int]) -> str:
    """The text up to the end token."""
    names = list(VOCABULARY)
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return "".join(names[token] for token in tokens)


class Example(NamedTuple):
    """A demonstration, as tokens."""

    prompt: list[int]
    solution: list[int]
    """With the end token."""


class Demonstrations(NamedTuple):
    """What is demonstrated."""

    longest: int
    formats: Sequence[Format]
    terse: float
    """Share of the solutions that leave out easy steps."""
    shuffled: float = SHUFFLED

    def draw(self, rng: random.Random) -> Example:
        problem, order = draw(rng, rng.randint(1, self.longest)), list(range(self.longest + 1))
        order = order[: len(problem.steps) + 1]
        if rng.random() < self.shuffled:
            rng.shuffle(order)
        text = solve(problem, rng, OMITTED if rng.random() < self.terse else 0.0)
        return Example(encode(rng.choice(self.formats)(problem, order)), [*encode(text), END])

    def batches(self, rng: random.Random, size: int) -> Iterator[list[Example]]:
        """Batches of about the same lengths, but of all kinds: without that, lengths are forgotten one by one."""
        while True:
            examples = sorted((self.draw(rng) for _ in range(4 * size)), key=lambda one: len(one.prompt + one.solution))
            groups = [examples[start : start + size] for start in range(0, len(examples), size)]
            rng.shuffle(groups)
            yield from groups


def questions(rng: random.Random, count: int, length: int, form: Format) -> tuple[list[list[int]], list[Problem]]:
    """Prompts of one length, as tokens, and their problems."""
    problems = [draw(rng, length) for _ in range(count)]
    return [encode(form(problem, range(length + 1))) for problem in problems], problems
