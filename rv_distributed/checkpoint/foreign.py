"""Folders that training frameworks write and that are not read: told by the names of their files, each with the tool
that converts it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final, NamedTuple

from rv_distributed.checkpoint.distributed import METADATA_FILE

_MEGATRON: Final = (
    "a Megatron checkpoint",
    "Its weights are stacked and fused in Megatron's own way: export it with Megatron Bridge (AutoBridge.export_ckpt), "
    "or one of verl's with 'python -m verl.model_merger merge --backend megatron --local_dir FOLDER --target_dir OUT'.",
)
_KINDS: Final = (
    (
        re.compile(r"(^|/)model_world_size_\d+_rank_\d+\.pt$"),
        "verl's files of FSDP ranks",
        "They are pickles, one a rank: merge them with 'python -m verl.model_merger merge --backend fsdp --local_dir "
        "FOLDER --target_dir OUT'.",
    ),
    (re.compile(r"(^|/)mp_rank_\d+(_\d+)*/(model_optim_rng|model_rng|distrib_optim)\.pt$"), *_MEGATRON),
    (re.compile(r"(^|/)latest_checkpointed_iteration\.txt$"), *_MEGATRON),
    (
        re.compile(r"(^|/)(bf16_)?(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt$"),
        "a DeepSpeed checkpoint",
        "Convert it with the script that DeepSpeed puts beside it: 'python zero_to_fp32.py FOLDER OUT "
        "--safe_serialization'.",
    ),
)


class Foreign(NamedTuple):
    """What a folder holds, and what to do about it."""

    kind: str
    file: str
    """One of its files that shows it."""
    remedy: str


def is_megatron(names: Collection[str]) -> bool:
    """Whether a folder with a ``.metadata`` is one of Megatron's, whose tensors are not those of the model."""
    return "common.pt" in names or "metadata.json" in names


def foreign(names: Collection[str]) -> Foreign | None:
    """What a folder without safetensors holds, when it is known; ``names`` are those of all files below it."""
    if METADATA_FILE in names and is_megatron(names):
        return Foreign(_MEGATRON[0], METADATA_FILE, _MEGATRON[1])
    for pattern, kind, remedy in _KINDS:
        shows = next((name for name in names if pattern.search(name)), None)
        if shows is not None:
            return Foreign(kind, shows, remedy)
    inside = next((name for name in sorted(names) if name.endswith(f"/{METADATA_FILE}")), None)
    if inside is not None:
        remedy = f"Give that folder: FOLDER/{inside.removesuffix(METADATA_FILE).rstrip('/')}."
        return Foreign("a distributed checkpoint in a folder of its own", inside, remedy)
    part = next((name for name in names if name.endswith(".distcp")), None)
    if part is not None:
        remedy = f"Copy the whole folder: {METADATA_FILE} says what the files hold."
        return Foreign(f"parts of a distributed checkpoint without its {METADATA_FILE}", part, remedy)
    return None
