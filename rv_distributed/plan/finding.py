"""Where another checkpoint has the elements of a tensor of the frame: by its name or, failing that, by the rules.

The rules, in the order in which `Finder.find` tries them: the name as ``--key-mapping`` makes it; the one tensor that
has the same name without wrappers; the parts of a fused tensor, or the fused tensor that it is a part of; the tensor
that the config ties it to. Shapes have to be the same, but for the rows of two vocabularies.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, Final, NamedTuple

from rv_distributed.checkpoint.bare_names import bare_name, embedding_and_head, is_of_vocabulary
from rv_distributed.checkpoint.config import is_untied, vocab_size
from rv_distributed.checkpoint.dtypes import COMPUTABLE
from rv_distributed.checkpoint.key_mapping import KeyRule
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import Source
from rv_distributed.plan.layouts import Part, is_transposed, parts_of
from rv_distributed.recipe import Role

_CHECK: Final = "Check that the inputs are the same model, or leave the tensor out with --exclude."
_OVERLAP: Final = (
    "Give --vocab-mismatch overlap to add the rows that all inputs have, or leave the tensor out with --exclude."
)
_NAME_THEM: Final = "Say which one it is with --key-mapping."
_CONVERT: Final = "Convert one checkpoint to the other's layout first, or leave the tensor out with --exclude."


class Stretch(NamedTuple):
    """Consecutive elements of a tensor of the frame that lie one after the other in a tensor elsewhere."""

    stop: int
    """One past the last of them. They begin where those of the stretch before it end."""
    tensor: Tensor
    shift: int
    """Element ``i`` of the frame's tensor is element ``i + shift`` of ``tensor``."""


class Found(NamedTuple):
    """Where a checkpoint has a tensor of the frame."""

    stretches: tuple[Stretch, ...]
    """They may end before the tensor does: then the checkpoint has only its first rows."""
    notes: tuple[tuple[str, str], ...] = ()
    """The rules by which it was found, each with what it found; empty for the same name and shape."""


class Misfit(NamedTuple):
    """Why what a checkpoint has under a name, or under several, is not the frame's tensor."""

    what: str
    remedy: str


class Frame(NamedTuple):
    """The checkpoint that gives the output its names and shapes."""

    checkpoint: Checkpoint
    role: Role
    """target; donor when a vector is extracted; base when models are summed."""


class _Slice(NamedTuple):
    """A part of a tensor."""

    name: str
    """Of the whole tensor, as this checkpoint has it."""
    tensor: Tensor
    first: int
    """Its first element there."""
    shape: tuple[int, ...]


class Finder:
    """A checkpoint whose tensors are found by the frame's names."""

    def __init__(self, checkpoint: Checkpoint, frame: Frame, rules: Sequence[KeyRule], *, overlap: bool) -> None:
        """``rules`` are those of ``--key-mapping``, ``overlap`` says whether another vocabulary will do."""
        self.checkpoint = checkpoint
        self._frame, self._frame_role = frame
        self._overlap = overlap
        self._used: set[str] = set()
        self.tensors: Mapping[str, Tensor] = checkpoint.tensors
        """By their names, as the rules make them."""
        self.stored_names: dict[str, str] = {}
        """Of those that the rules name anew, as the checkpoint has them."""
        self.collisions: dict[str, list[str]] = {}
        """Names that the rules give to several tensors, with the names of these."""
        self.uses = [0] * len(rules)
        """How many names each rule has changed."""
        if rules and checkpoint.uri != frame.checkpoint.uri:
            self._rename([re.compile(rule.pattern) for rule in rules], [rule.replacement for rule in rules])

    def _rename(self, patterns: Sequence[re.Pattern[str]], replacements: Sequence[str]) -> None:
        tensors: dict[str, Tensor] = {}
        for stored, tensor in self.checkpoint.tensors.items():
            name = stored
            for number, pattern in enumerate(patterns):
                new = pattern.sub(replacements[number], name)
                self.uses[number] += new != name
                name = new
            if name in tensors:
                self.collisions.setdefault(name, [self.stored_names.get(name, name)]).append(stored)
                continue
            tensors[name] = tensor
            if name != stored:
                self.stored_names[name] = stored
        self.tensors = tensors

    def plain(self, name: str, shape: tuple[int, ...]) -> Source | None:
        """The tensor of this name, when nothing about it is special: most are so, and large models have many."""
        own = self.tensors.get(name)
        if own is None or own.shape != shape or own.dtype not in COMPUTABLE or self.stored_names:
            return None
        return self.checkpoint.source(own)

    def find(self, name: str, tensor: Tensor) -> Found | Misfit | None:
        """Where this checkpoint has the frame's ``tensor``; None when it has nothing that could be it."""
        own = self.tensors.get(name)
        if own is not None:
            if name not in self.stored_names and own.shape == tensor.shape:
                return Found((Stretch(tensor.elements, own, 0),))
            notes = [("key mapping", self.stored_names[name])] if name in self.stored_names else []
            return self._fit(own, tensor, notes)
        key = bare_name(name)
        alike = self._strays.get(key, [])
        if len(alike) > 1 or (alike and self._wanted[key] > 1):
            what = f"could be {' or '.join(map(repr, alike))}, which without wrappers are not the only ones like it"
            return Misfit(what, _NAME_THEM)
        if alike:
            self._used.add(alike[0])
            return self._fit(self.tensors[alike[0]], tensor, [("names", self._stored(alike[0]))])
        return self._gather(name, key, tensor) or self._tied(name, tensor)

    def leftovers(self) -> list[str]:
        """The tensors that were not found to be any of the frame's, by their names here."""
        return [self._stored(name) for names in self._strays.values() for name in names if name not in self._used]

    def is_head_of_tied(self, stored: str) -> bool:
        """Whether a leftover looks like a head, and the frame has one tensor for both head and embedding."""
        shape = self.checkpoint.tensors[stored].shape
        return is_of_vocabulary(stored) and shape == (self._rows, self._tied_width)

    @cached_property
    def _twins(self) -> dict[str, Tensor]:
        """The frame's embedding and head."""
        return embedding_and_head(self._frame.tensors, vocab_size(self._frame.config))

    @cached_property
    def _tied_width(self) -> int | None:
        """Columns of the frame's embedding, where that is its head too."""
        widths = [tensor.shape[1] for tensor in self._twins.values()]
        return widths[0] if len(widths) == 1 and not is_untied(self._frame.config) else None

    @property
    def _rows(self) -> int | None:
        return vocab_size(self.checkpoint.config)

    @property
    def _config(self) -> Mapping[str, Any]:
        return self.checkpoint.config or self._frame.config

    def _stored(self, name: str) -> str:
        return self.stored_names.get(name, name)

    @cached_property
    def _strays(self) -> dict[str, list[str]]:
        """By their bare names, the tensors that the frame has not under the same name."""
        strays: dict[str, list[str]] = {}
        for name in self.tensors:
            if name not in self._frame.tensors:
                strays.setdefault(bare_name(name), []).append(name)
        return strays

    @cached_property
    def _wanted(self) -> Counter[str]:
        """How many of the frame's tensors that are not here by their names have a bare name."""
        return Counter(bare_name(name) for name in self._frame.tensors if name not in self.tensors)

    @cached_property
    def _slices(self) -> dict[str, _Slice]:
        """The parts of fused tensors that the frame has not, by their bare names."""
        slices: dict[str, _Slice] = {}
        for key, names in self._strays.items():
            tensor = self.tensors[names[0]]
            parts = parts_of(key, tensor.shape, self._config)
            if len(names) > 1 or parts[0].name == key:
                continue
            first = 0
            for part in parts:
                slices[part.name] = _Slice(names[0], tensor, first, part.shape)
                first += math.prod(part.shape)
        return slices

    def _fit(self, own: Tensor, tensor: Tensor, notes: list[tuple[str, str]]) -> Found | Misfit:
        """``own`` as the frame's ``tensor``, if it has its shape, or its shape but for the rows of a vocabulary."""
        if own.shape == tensor.shape:
            return Found((Stretch(tensor.elements, own, 0),), tuple(notes))
        what = f"has shape {list(own.shape)}, but {list(tensor.shape)} in the {self._frame_role}"
        rows = (own.shape[:1], tensor.shape[:1]) == ((self._rows,), (vocab_size(self._frame.config),))
        if not rows or own.shape[1:] != tensor.shape[1:]:
            return Misfit(what, _CHECK)
        if not self._overlap:
            return Misfit(f"{what}: the rows of two vocabularies", _OVERLAP)
        shared = min(own.shape[0], tensor.shape[0])
        stretch = Stretch(shared * math.prod(tensor.shape[1:]), own, 0)
        return Found((stretch,), (*notes, ("vocabulary", f"the first {shared} of {own.shape[0]} rows")))

    def _gather(self, name: str, key: str, tensor: Tensor) -> Found | Misfit | None:
        """The parts of a fused tensor that are tensors here, or the slice that the tensor is of one that is fused."""
        parts = parts_of(key, tensor.shape, self._frame.config or self._config)
        found = [self._slice_of(part) for part in parts]
        slices = [each for each in found if each is not None]
        if not slices:
            return None
        self._used.update(each.name for each in slices)
        if len(slices) < len(parts):
            missing = next(part.name for part, each in zip(parts, found, strict=True) if each is None)
            what = (
                f"is in several tensors here, but without {len(parts) - len(slices)} of {len(parts)}, such as {missing}"
            )
            return Misfit(what, _CHECK)
        if is_transposed(name, self._frame.tensors) or is_transposed(slices[0].name, self.tensors):
            what = "is in another layout here, and of one of them the experts are stored transposed"
            return Misfit(f"{what}: no row of one is a row of the other", _CONVERT)
        for part, each in zip(parts, slices, strict=True):
            if each.shape != part.shape:
                what = f"of {each.name} has shape {list(each.shape)}, but {list(part.shape)} in the {self._frame_role}"
                return Misfit(f"is in another layout here, and its part {part.name} {what}", _CHECK)
        return Found(_joined(parts, slices), (("layout", self._described(slices)),))

    def _slice_of(self, part: Part) -> _Slice | None:
        """A part of the frame's: of a tensor that is fused here, or one that is not."""
        names = self._strays.get(part.name, [])
        if len(names) == 1:
            return _Slice(names[0], self.tensors[names[0]], 0, self.tensors[names[0]].shape)
        return self._slices.get(part.name)

    def _described(self, slices: Sequence[_Slice]) -> str:
        first, last = self._stored(slices[0].name), self._stored(slices[-1].name)
        if first != last:
            return f"{len(slices)} tensors, {first} to {last}"
        return f"a part of {first}"

    def _tied(self, name: str, tensor: Tensor) -> Found | Misfit | None:
        """The one tensor that is embedding and head here, unless the config says that they are two."""
        if name not in self._twins or len(self._twins) > 2 or is_untied(self.checkpoint.config):
            return None
        here = embedding_and_head(self.tensors, self._rows)
        own = [of for of, other in here.items() if other.shape[1] == tensor.shape[1]]
        if len(own) != 1:
            return None
        self._used.add(own[0])
        return self._fit(self.tensors[own[0]], tensor, [("tied", f"{self._stored(own[0])}, which it is tied to")])


def _joined(parts: Sequence[Part], slices: Sequence[_Slice]) -> tuple[Stretch, ...]:
    """The slices one after the other, those that follow each other in a tensor as one."""
    stretches: list[Stretch] = []
    for part, each, stop in zip(parts, slices, accumulate(math.prod(part.shape) for part in parts), strict=True):
        shift = each.first - (stop - math.prod(part.shape))
        if stretches and stretches[-1].tensor is each.tensor and stretches[-1].shift == shift:
            stretches.pop()
        stretches.append(Stretch(stop, each.tensor, shift))
    return tuple(stretches)
