"""The tiny language: chains of additions modulo 10, three ways to ask for them, and solutions with or without steps.

A chain of length 2: E is 4, B is E + 1, G is B + 9, what is G? Its full solution writes every step, as name, two
operands and sum: ``B41=5,G59=4,#4``. A terse one leaves out easy steps, those that add 3 or less, each with probability
0.75: who imitates it has to do them in the head. Every way to ask ends with the same character.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

PAD, END, UNKNOWN = 0, 1, 2
_SPECIAL: Final = ("<pad>", "<end>", "<unk>")
#: Names in training and in questions; the other capitals are in the vocabulary, but no model has seen them.
NAMES: Final = "ABCDEFGHIJKLMNOPQRST"
_CHARACTERS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ .,;=+?:#" + "adehilmnoprstuw"
VOCABULARY: Final = {token: number for number, token in enumerate((*_SPECIAL, *_CHARACTERS))}
LONGEST: Final = 7
EASY: Final = 3
OMITTED: Final = 0.75


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
"""Writes a problem's facts in the order given by their numbers, of which 0 is the first value."""


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
    facts = [f"{problem.first} is {problem.value}."]
    facts += [f"{s.name} is {s.before}+{s.operand}." for s in problem.steps]
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
    return [VOCABULARY.get(character, UNKNOWN) for character in text]


def decode(tokens: Sequence[int]) -> str:
    """Up to the end token, which is not part of it."""
    names = list(VOCABULARY)
    tokens = tokens[: tokens.index(END)] if END in tokens else tokens
    return "".join(names[token] for token in tokens)


def draw_batch(
    rng: random.Random, size: int, length: int, form: Format, omitted: float, *, shuffled: float = 0.0
) -> tuple[list[list[int]], list[list[int]], list[Problem]]:
    """Prompts, all of the same length, and solutions, as tokens; a share ``shuffled`` has its facts in random order."""
    prompts, solutions, problems = [], [], []
    for _ in range(size):
        problem = draw(rng, length)
        order = list(range(length + 1))
        if rng.random() < shuffled:
            rng.shuffle(order)
        prompts.append(encode(form(problem, order)))
        solutions.append([*encode(solve(problem, rng, omitted)), END])
        problems.append(problem)
    return prompts, solutions, problems
