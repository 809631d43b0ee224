"""Which elements of which inputs belong together: for every tensor of the frame, the vectors that it gets.

Called by `make_plan`. `Finder.find` says where one input has a tensor; here the sides of all vectors are brought
together, and what is missing, misfits or cannot be computed with is told.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from rv_distributed.checkpoint.bare_names import is_known_buffer, is_of_vocabulary, pattern_of, renaming
from rv_distributed.checkpoint.config import vocab_size
from rv_distributed.checkpoint.dtypes import COMPUTABLE, DTYPES
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import Source, shifted
from rv_distributed.errors import Problem
from rv_distributed.plan.families import compared_tokenizers
from rv_distributed.plan.finding import Finder, Found, Frame, Misfit
from rv_distributed.plan.model import VectorOperand
from rv_distributed.plan.numbers import SAME, difference
from rv_distributed.plan.options import PlanOptions
from rv_distributed.units import plural

_NOWHERE: Final = "not in any vector"
_GIVE_OR_COPY: Final = "Say with --key-mapping which one it is, or leave the target's as it is with --missing copy."
_ALL_OR_NONE: Final = "Give models with the same tensors, or leave the tensor out with --exclude."
_SAME_OR_COPY: Final = "If they are the same, give them the same names with --key-mapping; if not, give --missing copy."

Stretches = tuple[tuple[int, tuple[VectorOperand, ...]], ...]
"""Consecutive elements of a tensor: one past their last one, and the vectors that they get."""


class Side(NamedTuple):
    """One checkpoint of a vector."""

    role: str
    """donor, reference or vector."""
    finder: Finder


class Pair(NamedTuple):
    """One vector's checkpoints, with the vector's index in the recipe."""

    vector: int
    plus: Side
    minus: Side | None

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.plus,) if self.minus is None else (self.plus, self.minus)


class _Placed(NamedTuple):
    """A vector, and where its sides have a tensor."""

    pair: Pair
    places: Sequence[Found]


class Match(NamedTuple):
    """What one tensor of the frame gets."""

    stretches: Stretches
    """Empty when no vector is added at all."""
    why: str
    """Why none is; else empty."""
    matched: str
    """How the vectors' elements were found, where not under the tensor's own name and shape."""


class Matching(NamedTuple):
    """What all tensors of the frame get."""

    tensors: tuple[Match, ...]
    """In the frame's order."""
    left_out: tuple[tuple[str, str], ...]
    """Tensors of other inputs that belong to none, with the reason."""
    rules: tuple[tuple[str, str], ...]
    """Each rule that was needed, with what it did, in words."""
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]


def match(frame: Frame, pairs: Sequence[Pair], options: PlanOptions) -> Matching:
    """Find the vectors' elements for every tensor of ``frame``."""
    matcher = _Matcher(frame, pairs, options)
    tensors = tuple(matcher.match(name, tensor) for name, tensor in frame.checkpoint.tensors.items())
    matcher.compare_what_is_left()
    matcher.compare_tokenizers(tensors)
    return Matching(tensors, matcher.left_out(), matcher.rules(), tuple(matcher.problems), tuple(matcher.warnings))


class _Matcher:
    def __init__(self, frame: Frame, pairs: Sequence[Pair], options: PlanOptions) -> None:
        self._frame, self._pairs, self._options = frame.checkpoint, pairs, options
        self._extracting, self._summing = frame.role == "donor", frame.role == "base"
        sides = [side for pair in pairs for side in pair.sides]
        self._others = list(
            dict.fromkeys(side.finder for side in sides if side.finder.checkpoint.name != frame.checkpoint.name)
        )
        self._only_here: list[str] = []
        self._notes: dict[tuple[str, str], Counter[str]] = {}
        self._overlapping: set[Finder] = set()
        self._added_to_rows: set[Finder] = set()
        self._matched = False
        self.warnings: list[str] = []
        self.problems = [problem for finder in self._others for problem in _collisions(finder)]

    def match(self, name: str, tensor: Tensor) -> Match:
        """The vectors' operands for one tensor, and why there are none, if so."""
        if not self._pairs:
            return Match((), "alpha is 0", "")
        selected = self._options.selects(name)
        if selected and tensor.dtype in COMPUTABLE and (vectors := self._plain(name, tensor)) is not None:
            return Match(((tensor.elements, vectors),), "", "") if vectors else Match((), SAME, "")
        found = [[side.finder.find(name, tensor) for side in pair.sides] for pair in self._pairs]
        if not selected:
            return Match((), "not selected by --include and --exclude", "")
        if not DTYPES[tensor.dtype].is_float:
            return Match((), f"{tensor.dtype} is not a floating-point dtype", "")
        both = list(zip(self._pairs, found, strict=True))
        if self._summing and any(None in places for places in found):
            self._incomplete(name, both)
            return Match((), _NOWHERE, "")
        whole = [(pair, places) for pair, places in both if None not in places]
        halves = [self._half(name, *each) for each in both if each not in whole and any(each[1])]
        if not whole:
            if (not halves or self._extracting) and not is_known_buffer(name):
                self._only_here.append(name)
            return Match((), halves[0] if halves else _NOWHERE, "")
        if tensor.dtype not in COMPUTABLE:
            self._cannot_compute(self._frame, name, tensor.dtype)
            return Match((), "", "")
        sound = [pair for pair in (self._sound(name, *each) for each in whole) if pair is not None]
        self._matched = True
        stretches, note = self._stretches(tensor, sound), self._note(name, sound)
        return Match(stretches, "", note) if any(vectors for _, vectors in stretches) else Match((), SAME, "")

    def _plain(self, name: str, tensor: Tensor) -> tuple[VectorOperand, ...] | None:
        """The vectors of a tensor that all inputs have as it is."""
        vectors = []
        for vector, plus_side, minus_side in self._pairs:
            plus, minus = plus_side.finder.plain(name, tensor.shape), None
            if plus is None:
                return None
            if minus_side is not None:
                minus = minus_side.finder.plain(name, tensor.shape)
                if minus is None:
                    return None
            vectors.append(difference(vector, plus, minus))
        self._matched = True
        return tuple(vector for vector in vectors if vector is not None)

    def _incomplete(self, name: str, found: Sequence[tuple[Pair, Sequence[Found | Misfit | None]]]) -> None:
        """A sum of models needs all of them."""
        for pair, places in found:
            if None in places:
                what = f"is not there, but in {self._frame.uri}"
                self.problems.append(Problem(pair.plus.finder.checkpoint.uri, what, _ALL_OR_NONE, name))

    def _half(self, name: str, pair: Pair, places: Sequence[Found | Misfit | None]) -> str:
        """Why a vector is not there that only one side has: a difference needs both."""
        lacking, other = pair.sides if places[0] is None else pair.sides[::-1]
        if not self._extracting and self._options.missing == "error" and not is_known_buffer(name):
            what = f"is missing, but the target and the {other.role} have it"
            self.problems.append(Problem(lacking.finder.checkpoint.uri, what, _GIVE_OR_COPY, name))
        return f"not in the {lacking.role}"

    def _sound(self, name: str, pair: Pair, places: Sequence[Found | Misfit | None]) -> _Placed | None:
        """A vector's sides, if both can be computed with. What is wrong with one becomes a problem."""
        found = []
        for side, place in zip(pair.sides, places, strict=True):
            if isinstance(place, Misfit):
                self.problems.append(Problem(side.finder.checkpoint.uri, place.what, place.remedy, name))
            elif place is not None:
                odd = next((s.tensor.dtype for s in place.stretches if s.tensor.dtype not in COMPUTABLE), None)
                if odd is None:
                    found.append(place)
                else:
                    self._cannot_compute(side.finder.checkpoint, name, odd)
        return _Placed(pair, found) if len(found) == len(places) else None

    def _cannot_compute(self, checkpoint: Checkpoint, name: str, dtype: str) -> None:
        what = f"is {dtype}; arithmetic is done on {', '.join(COMPUTABLE)}"
        remedy = "Convert the checkpoint first, or leave the tensor out with --exclude."
        self.problems.append(Problem(checkpoint.uri, what, remedy, name))

    def _stretches(self, tensor: Tensor, placed: Sequence[_Placed]) -> Stretches:
        """The tensor's elements, cut where a source begins or ends."""
        borders = {stretch.stop for each in placed for place in each.places for stretch in place.stretches}
        stretches = []
        for stop in sorted(borders | {tensor.elements}):
            vectors = (self._vector(each, stop) for each in placed)
            stretches.append((stop, tuple(vector for vector in vectors if vector is not None)))
        return tuple(stretches)

    def _vector(self, placed: _Placed, stop: int) -> VectorOperand | None:
        """What a vector adds up to ``stop``; None where a side of it has no such rows, or both have the same."""
        pair, places = placed
        plus = _source(pair.plus.finder, places[0], stop)
        if plus is None or pair.minus is None:
            return VectorOperand(pair.vector, plus, None) if plus is not None else None
        minus = _source(pair.minus.finder, places[1], stop)
        if self._extracting and minus is None:
            return VectorOperand(pair.vector, plus, plus)  # rows that the reference lacks are no difference: A − A
        return difference(pair.vector, plus, minus) if minus is not None else None

    def _note(self, name: str, placed: Sequence[_Placed]) -> str:
        """How the sides of the vectors were found, for the table; counted for the summary."""
        texts: dict[str, list[str]] = {}
        for pair, places in placed:
            for side, place in zip(pair.sides, places, strict=True):
                for rule, what in place.notes:
                    self._notes.setdefault((rule, _summary(rule, name, what)), Counter())[side.role] += 1
                    if rule == "vocabulary":
                        self._overlapping.add(side.finder)
                if place.notes:
                    texts.setdefault(", ".join(what for _, what in place.notes), []).append(side.role)
        return "; ".join(f"{', '.join(dict.fromkeys(roles))}: {what}" for what, roles in texts.items())

    def compare_what_is_left(self) -> None:
        """Find problems where some tensors are only in the frame, and a vector has others with no place there: they may
        be the same. Where nothing was matched at all, that is what there is to say."""
        if not self._only_here or not self._matched or self._options.missing == "copy":
            return
        for pair in self._pairs:
            finders = [side.finder for side in pair.sides if side.finder in self._others]
            loose = [[name for name in finder.leftovers() if _could_be_missed(finder, name)] for finder in finders]
            # What only one side has would be no difference under any name.
            if loose and all(loose):
                here = f"{plural(len(self._only_here), 'tensor')} such as {self._only_here[0]!r}"
                there = f"{plural(len(loose[0]), 'tensor')} such as {loose[0][0]!r}"
                what = f"has {here} that no vector has, and {finders[0].checkpoint.uri} has {there} with no place here"
                self.problems.append(Problem(self._frame.uri, what, _SAME_OR_COPY))

    def compare_tokenizers(self, matches: Sequence[Match]) -> None:
        """Rows of two vocabularies belong together only where both tokenizers mean the same by them."""
        sides = {pair.vector: pair.sides for pair in self._pairs}
        rows = vocab_size(self._frame.config)
        for (name, tensor), found in zip(self._frame.tensors.items(), matches, strict=True):
            if found.stretches and (tensor.shape[:1] == (rows,) or is_of_vocabulary(name)):
                given = (vector for _, vectors in found.stretches for vector in vectors)
                self._added_to_rows.update(side.finder for vector in given for side in sides[vector.vector])
        if not self._options.force_tokenizer_mismatch:
            compared = {f.checkpoint: f in self._overlapping for f in self._others if f in self._added_to_rows}
            problems, self.warnings = compared_tokenizers(self._frame, compared)
            self.problems += problems

    def left_out(self) -> tuple[tuple[str, str], ...]:
        """The tensors of other inputs that have no place here, by name, each with the reason."""
        names: dict[str, str] = {}
        for finder in self._others:
            for name in finder.leftovers():
                tied = ", and head and embedding are one here" if finder.is_head_of_tied(name) else ""
                names.setdefault(name, f"only in {finder.checkpoint.uri}{tied}")
        return tuple(sorted(names.items()))

    def rules(self) -> tuple[tuple[str, str], ...]:
        """Every rule that was needed and what it did, in words."""
        lines: dict[str, list[str]] = {}
        for (rule, text), counts in sorted(self._notes.items(), key=lambda note: -max(note[1].values())):
            of = f"{', '.join(counts)}: {text}"
            lines.setdefault(rule, []).append(f"{of} ({plural(max(counts.values()), 'tensor')})")
        forced = self._options.force_tokenizer_mismatch
        compared = "tokenizers were not compared" if forced else "the tokenizers have the same tokens there"
        if self.warnings:
            compared = "the tokenizers differ in added tokens only"
        if self._overlapping:
            lines["vocabulary"].insert(0, f"{compared}; other rows stay as they are")
        elif self.warnings or (forced and self._added_to_rows):
            lines["vocabulary"] = [compared]
        for number, (pattern, _) in enumerate(self._options.key_mapping):
            if not any(finder.uses[number] for finder in self._others):
                lines.setdefault("key mapping", []).append(f"no name is changed by {pattern!r}")
        return tuple((name, text) for name, texts in lines.items() for text in texts)


def _collisions(finder: Finder) -> Iterator[Problem]:
    for name, stored in finder.collisions.items():
        what = f"is the name that --key-mapping gives to several tensors: {', '.join(map(repr, stored))}"
        yield Problem(finder.checkpoint.uri, what, "Correct the rules: every tensor needs a name of its own.", name)


def _could_be_missed(finder: Finder, name: str) -> bool:
    tensor = finder.checkpoint.tensors[name]
    return DTYPES[tensor.dtype].is_float and not is_known_buffer(name) and not finder.is_head_of_tied(name)


def _summary(rule: str, name: str, what: str) -> str:
    """What a rule did, in words that are the same for all layers and experts."""
    name, what = pattern_of(name), pattern_of(what)
    if rule == "names":
        ours, theirs = renaming(name, what)
        return f"{theirs!r} → {ours!r}"
    return f"{name} as {what}"


def _source(finder: Finder, place: Found, stop: int) -> Source | None:
    """Where a checkpoint has the elements up to ``stop``; None beyond those that it has."""
    number = bisect_left(place.stretches, stop, key=lambda stretch: stretch.stop)
    if number == len(place.stretches):
        return None
    _, tensor, shift = place.stretches[number]
    return shifted(finder.checkpoint.source(tensor), shift)
