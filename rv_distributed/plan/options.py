"""The options that decide what is written, as they are given and as a manifest records them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Final, get_args

from rv_distributed.checkpoint.dtypes import FROM_USER
from rv_distributed.checkpoint.key_mapping import KeyRule, flaw_of
from rv_distributed.errors import UsageError
from rv_distributed.plan.layout import PIECE_ALIGNMENT
from rv_distributed.recipe import ComputeDType, Missing, Role, Rounding, Stats, VocabMismatch, check_pattern


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """The options that decide what is written."""

    dtype: str = "auto"
    """Of the output's F16, BF16 and F32 tensors: float32, bfloat16, float16, or auto: the target's own, tensor
    by tensor, and float32 for a vector."""
    max_shard_bytes: int = 5_000_000_000
    """Most tensor data in one shard; a larger tensor gets a shard to itself."""
    include: str | None = None
    """Only tensors whose name this regular expression finds get the vectors."""
    exclude: str | None = None
    """Tensors whose name this regular expression finds do not get the vectors."""
    piece_bytes: int | None = None
    """Size of the unit of scheduling: 1 MiB times a power of two; None for 8 to 64 MiB, by the size of the output."""
    rounding: Rounding = "nearest"
    """To outputs of 16 bits: nearest (even), or stochastic, whose expectation is the value that is rounded."""
    seed: int = 0
    """Of stochastic rounding: 0 to 2⁶⁴ − 1. The same seed gives the same bytes, wherever they are computed."""
    compute_dtype: ComputeDType = "float32"
    """In which the arithmetic is done, and alpha used."""
    stats: Stats = "full"
    """What is measured of every tensor: see the README. It changes the table and the manifest, not the weights."""
    vocab_mismatch: VocabMismatch = "error"
    """Of inputs with vocabularies of other sizes: error, or overlap: the rows that all have get the vector."""
    force_tokenizer_mismatch: bool = False
    """Whether an id may stand for another token in another input or, with overlap, for one that nobody can tell."""
    missing: Missing = "error"
    """Of tensors that get no difference, as one side lacks them: error, or copy. See the README for what is missing."""
    key_mapping: tuple[KeyRule, ...] = ()
    """Applied, all in their order, to the names of every input but the one that gives the output its names."""
    requantize: bool = False
    """Write the target's FP8 weights as FP8 again, with new scales; without it, they become bfloat16."""
    sidecars_from: Role | None = None
    """The input whose small files go with the output; None: the target, or the donor of an extract."""

    def __post_init__(self) -> None:
        if self.requantize and self.dtype != "auto":
            raise UsageError(f"--requantize writes the target's own dtypes: leave out --dtype {self.dtype}")
        if self.dtype != "auto" and self.dtype not in FROM_USER:
            raise UsageError(f"dtype {self.dtype!r} is not one of auto, {', '.join(sorted(FROM_USER))}")
        if self.max_shard_bytes <= 0:
            raise UsageError("the largest shard must have a positive size")
        # Then the measures add up to the same sums for every size.
        size = self.piece_bytes
        if size is not None and (size < PIECE_ALIGNMENT or size & (size - 1)):
            raise UsageError(f"pieces must be of 1 MiB times a power of two, not of {size} bytes")
        for name, value, choices in (
            ("rounding", self.rounding, Rounding),
            ("compute dtype", self.compute_dtype, ComputeDType),
            ("stats", self.stats, Stats),
            ("vocab mismatch", self.vocab_mismatch, VocabMismatch),
            ("missing", self.missing, Missing),
            ("sidecars from", self.sidecars_from or "target", Role),
        ):
            if value not in get_args(choices):
                raise UsageError(f"{name} {value!r} is not one of {', '.join(get_args(choices))}")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed: {self.seed} is not between 0 and 2⁶⁴ − 1")
        if self.seed and self.rounding != "stochastic":
            raise UsageError(f"--seed {self.seed} changes nothing without --rounding stochastic; give both or neither")
        for pattern in (self.include, self.exclude):
            check_pattern(pattern or "")
        if len({rule.pattern for rule in self.key_mapping}) < len(self.key_mapping):
            raise UsageError("the key mapping has two rules of one regular expression")
        for rule in self.key_mapping:
            if flaw := flaw_of(rule):
                raise UsageError(f"the key mapping {flaw}")

    @property
    def is_selective(self) -> bool:
        return self.include is not None or self.exclude is not None

    def selects(self, name: str) -> bool:
        """Whether a tensor of this name gets the vectors."""
        return (self.include is None or re.search(self.include, name) is not None) and (
            self.exclude is None or re.search(self.exclude, name) is None
        )

    @property
    def needs_tokenizers(self) -> bool:
        """Whether the plan needs the tokens of the inputs."""
        return not self.force_tokenizer_mismatch or self.sidecars_from is not None

    def recorded(self, dtype: str) -> tuple[tuple[str, str], ...]:
        """For the manifest and for resume: all that change the output, with the dtype that was chosen."""
        return (
            ("dtype", dtype),
            ("max_shard_bytes", str(self.max_shard_bytes)),
            ("include", self.include or ""),
            ("exclude", self.exclude or ""),
            ("rounding", self.rounding),
            ("seed", str(self.seed)),
            ("compute_dtype", self.compute_dtype),
            ("stats", self.stats),
            ("requantize", "fp8" if self.requantize else ""),
            ("vocab_mismatch", self.vocab_mismatch),
            ("force_tokenizer_mismatch", json.dumps(self.force_tokenizer_mismatch)),
            ("missing", self.missing),
            ("key_mapping", json.dumps(self.key_mapping, ensure_ascii=False)),
            ("sidecars_from", self.sidecars_from or ""),
        )


#: The options that the command line and recipe files have, too, by the same names and with the same values.
SHARED_OPTIONS: Final = tuple(
    field.name for field in fields(PlanOptions) if field.name not in ("max_shard_bytes", "piece_bytes", "key_mapping")
)
