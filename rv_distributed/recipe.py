"""What to compute: ``O = T + Σ αₖ·vₖ``, ``V = A − B`` or ``O = Σ αₖ·Mₖ``, over checkpoints named by path.

Made from command line flags, Python arguments or recipe files; turned into a plan by `rv_distributed.plan.make_plan`
once the checkpoints are open.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from rv_distributed.checkpoint.manifest import WITHOUT_TARGET
from rv_distributed.errors import UsageError

Operation = Literal["extract", "apply", "transfer", "task_arithmetic", "linear"]
Order = Literal["each", "sum", "fused"]
ComputeDType = Literal["float32", "float64"]
Rounding = Literal["nearest", "stochastic"]
Stats = Literal["full", "basic", "none"]
VocabMismatch = Literal["error", "overlap"]
Missing = Literal["error", "copy"]
Role = Literal["target", "donor", "reference", "vector", "model", "base"]
_PLACEHOLDER: Final = re.compile(r"\{([^{}/]*)\}")


class Arithmetic(NamedTuple):
    """How values are computed and rounded; the same for all tensors of a plan."""

    compute_dtype: ComputeDType
    """In which differences, products and sums are rounded."""
    rounding: Rounding
    """To an output's dtype of 16 bits; to float32 it is always to nearest."""
    seed: int
    """Of stochastic rounding: 0 to 2⁶⁴ − 1."""
    order: Order = "each"
    """``each``: every ``α·d`` is rounded and added to the target's value. ``sum``: they are added to each other, their
    sum is divided and scaled, and then added. ``fused``: as ``sum``, but ``α·d`` is not rounded before it is added."""


class Weights(NamedTuple):
    """The numbers that a tensor is computed with in one output, in the dtype of the arithmetic."""

    alphas: tuple[float, ...] = ()
    """One a vector that the tensor gets."""
    divisor: float = 1.0
    """Of the vectors' sum, where they are added to each other first; and then its factor."""
    scale: float = 1.0

    @property
    def moves(self) -> bool:
        """Whether the output gets any vector."""
        return any(self.alphas)


class Choice(NamedTuple):
    """An alpha for some tensors."""

    values: tuple[float, ...]
    """One; or several, at even distances from the first layer to the last, with straight lines between them. What lies
    in no layer gets the first."""
    match: tuple[str, ...] = ()
    """Regular expressions that all have to find something in the tensor's name."""


@dataclass(frozen=True, slots=True)
class ByTensor:
    """An alpha that depends on the tensor: that of the first choice that fits, and 0 where none does."""

    choices: tuple[Choice, ...]

    def at(self, name: str, depth: float) -> float:
        """The alpha of the tensor ``name``; ``depth`` is 0 in the first layer, 1 in the last, and 0 in none."""
        for values, match in self.choices:
            if all(re.search(pattern, name) for pattern in match):
                place = depth * (len(values) - 1)
                low = int(place)
                high, part = min(low + 1, len(values) - 1), place - low
                return (1 - part) * values[low] + part * values[high]
        return 0.0


Alpha = float | ByTensor


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector to add: stored, or the difference of two checkpoints. Of a linear combination, one of its models."""

    plus: str
    """The stored vector, the donor, or the model."""
    minus: str | None = None
    """The reference; None for a stored vector and for a model."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A linear combination of checkpoints, and the outputs wanted of it."""

    operation: Operation
    target: str | None
    """The model that receives the vectors; None to extract, and for a linear combination."""
    vectors: tuple[Vector, ...]
    """In the order in which they are added."""
    alphas: tuple[tuple[Alpha, ...], ...]
    """One tuple an output, with one alpha a vector. All outputs are made in one pass."""
    normalize: bool = False
    """Divide the vectors' sum by that of their alphas. This and ``scale`` go with task_arithmetic and linear."""
    scale: Alpha = 1.0
    """Factor of the vectors' sum."""
    base: str | None = None
    """Of a linear combination: the model that gives names and small files, if not the first one."""

    def __post_init__(self) -> None:
        if not self.vectors:
            raise UsageError("nothing to add: give at least one vector")
        if not self.alphas or any(len(row) != len(self.vectors) for row in self.alphas):
            raise UsageError("give one alpha for each vector")
        if (self.target is None) != (self.operation in WITHOUT_TARGET):
            raise UsageError(f"{self.operation} {'needs' if self.target is None else 'has no'} target")
        if (self.normalize or self.scale != 1.0) and self.order == "each":
            raise UsageError(f"normalize and scale go with task_arithmetic and linear, not with {self.operation}")
        for alpha in (*(alpha for row in self.alphas for alpha in row), self.scale):
            for value in values_of(alpha):
                try:
                    finite = math.isfinite(value) and math.isfinite(as_float32(value))
                except TypeError:
                    raise UsageError(f"alpha {value!r} is not a number") from None
                if not finite:
                    raise UsageError(f"alpha {value} is not a finite float32")
            for pattern in patterns_of(alpha):
                check_pattern(pattern)

    @property
    def order(self) -> Order:
        """In which the vectors are added: see `Arithmetic`."""
        orders: dict[Operation, Order] = {"task_arithmetic": "sum", "linear": "fused"}
        return orders.get(self.operation, "each")

    @property
    def used(self) -> tuple[int, ...]:
        """The vectors that some output gets, by their index: those whose alpha is not always 0."""
        return tuple(
            number
            for number in range(len(self.vectors))
            if self.target is None
            or any(as_float32(value) != 0.0 for row in self.alphas for value in values_of(row[number]))
        )

    @property
    def frame(self) -> str:
        """The checkpoint that gives names, shapes and small files: the target, or the donor of an extract, or the base
        or first model of a linear combination."""
        return self.target or self.base or self.vectors[0].plus

    @property
    def frame_role(self) -> Role:
        """What the frame is in this operation."""
        roles: dict[Operation, Role] = {"extract": "donor", "linear": "base"}
        return roles.get(self.operation, "target")

    @property
    def roles(self) -> tuple[tuple[Role, str], ...]:
        """All checkpoints with their roles, used or not, in their order."""
        roles: list[tuple[Role, str]] = [("target", self.target)] if self.target is not None else []
        roles += [("base", self.base)] if self.base is not None else []
        for vector in self.vectors:
            if vector.minus is None:
                roles.append(("model" if self.operation == "linear" else "vector", vector.plus))
            else:
                roles += [("donor", vector.plus), ("reference", vector.minus)]
        return tuple(roles)

    def giver(self, role: Role | None) -> str:
        """The checkpoint whose small files go with the outputs: that of a role, or the frame.

        Raises UsageError when the role is nobody's, or several have it.
        """
        if role is None:
            return self.frame
        found = [name for other, name in self.roles if other == role]
        if len(found) != 1:
            has = ", ".join(dict.fromkeys(other for other, _ in self.roles))
            number = "several inputs are that" if found else f"{self.operation} has {has}"
            raise UsageError(f"--sidecars-from {role}: {number}")
        return found[0]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The checkpoints that are used, in the order of their roles, each once."""
        names = [self.frame] + [name for n in self.used for name in (self.vectors[n].plus, self.vectors[n].minus)]
        return tuple(dict.fromkeys(name for name in names if name is not None))


def values_of(alpha: Alpha) -> Iterator[float]:
    """All numbers in an alpha."""
    if isinstance(alpha, ByTensor):
        for choice in alpha.choices:
            yield from choice.values
    else:
        yield alpha


def in_words(alpha: ByTensor) -> str:
    """For people: ``0.3 for \\.mlp\\., 0.1→0.2 over the layers for the rest``."""
    texts: list[str] = []
    for values, match in alpha.choices:
        text = "→".join(map(show_alpha, values)) + (" over the layers" if len(values) > 1 else "")
        # An empty expression, that of a sweep over all tensors, finds itself in every name.
        patterns = " and ".join(filter(None, match)) or ("the rest" if texts else "")
        texts.append(f"{text} for {patterns}" if patterns else text)
    return ", ".join(texts)


def patterns_of(alpha: Alpha) -> Iterator[str]:
    """All regular expressions in an alpha."""
    if isinstance(alpha, ByTensor):
        for choice in alpha.choices:
            yield from choice.match


def check_pattern(pattern: str) -> None:
    """Raise UsageError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is not a regular expression: {error}") from None


def named_out(template: str, labels: Mapping[str, str]) -> str:
    """The name of an output: ``template`` with what ``labels`` has for each ``{name}`` in it. Raises UsageError for a
    name that they do not have, but in a folder that exists: that is called so."""

    def label(found: re.Match[str]) -> str:
        if found[1] in labels:
            return labels[found[1]]
        if os.path.isdir(template[: found.end()] + template[found.end() :].partition("/")[0]):
            return found[0]
        known = " and ".join(f"{{{name}}}" for name in labels)
        what = f"{found[0]} stands for nothing here{f', only {known}' if known else ''}"
        raise UsageError(f"--out: {what}. Only a folder that exists may have braces in its name.")

    return _PLACEHOLDER.sub(label, template)


def show_alpha(alpha: float) -> str:
    """The shortest decimal that is ``alpha``, in float32 or else in float64: 0.7, not 0.699999988."""
    texts = (f"{alpha:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if alpha in (as_float32(float(text)), float(text)))


def as_float32(alpha: float) -> float:
    """``alpha`` rounded to float32, the precision in which it is used; infinity where it overflows."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", alpha))[0])
    except OverflowError:
        return math.inf
