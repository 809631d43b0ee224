"""LoRA adapters, as PEFT writes them: what adapter_config.json says, and which of the base's tensors they change.

``W = base + scale·B·A`` for each weight that has factors A and B, with scale = alpha / r, or alpha / √r with
``use_rslora`` (PEFT: `LoraLayer.get_delta_weight`). A tensor that the adapter has whole takes the base's place.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from rv_distributed.checkpoint.bare_names import bare_name
from rv_distributed.checkpoint.dtypes import ARITHMETIC
from rv_distributed.checkpoint.model import Checkpoint, Tensor
from rv_distributed.checkpoint.sources import LowRank
from rv_distributed.errors import Problem

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
#: What makes of an adapter more than ``base + scale·B·A``, when its config turns it on.
_NOT_READ: Final = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"),
)
#: Ways of initialising an adapter that also change the base's weights.
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MERGE: Final = "Merge it with PEFT (merge_and_unload, then save_pretrained), and give the merged model."
_CHECK_BASE: Final = "Give the base that the adapter was trained on."
_FACTOR: Final = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?")
_INSIDE: Final = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
#: Beyond it, float32 has infinity.
_LARGEST_ALPHA: Final = 3.4e38
_QUANTIFIERS: Final = re.compile(r"[*+?{]")


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a folder that was opened holds an adapter and no model."""
    return "peft_type" in checkpoint.config


def ranks_of(adapter: Checkpoint) -> list[int]:
    """The ranks of its weights, least first."""
    factors = (tensor for name, tensor in adapter.tensors.items() if "lora_A" in name or "lora_embedding_A" in name)
    return sorted({tensor.shape[0] for tensor in factors if tensor.shape})


class _Factors(NamedTuple):
    """Both factors of one weight, by the names of their tensors."""

    a: str
    b: str
    is_embedding: bool


def adapted(base: Checkpoint, adapter: Checkpoint) -> tuple[dict[str, Tensor], list[Problem]]:
    """The tensors of ``base`` with an adapter, and what is wrong with it."""
    problems = _config_problems(adapter)
    if problems:
        return dict(base.tensors), problems
    found = dict(base.tensors)
    named = _Names(found)
    factors, whole = _sorted_out(adapter, problems)
    for name, tensor in whole.items():
        own = named.find(_module(name))
        if own is None:
            problems.append(_no_base(adapter, name, _module(name)))
        else:
            found[own] = tensor._replace(source=adapter.source(tensor))
    for module, pair in factors.items():
        own = named.find(f"{module}.weight")
        if own is None:
            problems.append(_no_base(adapter, pair.a, f"{module}.weight"))
            continue
        source = _low_rank(base, found[own], adapter, module, pair)
        if isinstance(source, Problem):
            problems.append(source)
        else:
            found[own] = found[own]._replace(source=source)
    return found, problems


def _config_problems(adapter: Checkpoint) -> list[Problem]:
    config, where = adapter.config, adapter.path(ADAPTER_CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        return [Problem(where, f"has the peft_type {kind!r:.80}; LORA is read", _MERGE)]
    problems = [
        Problem(where, f"has {option} {config[option]!r:.80}, which is not read", _MERGE)
        for option in _NOT_READ
        if config.get(option)
    ]
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        what = f"has init_lora_weights {start!r:.80}, which changed the base's own weights"
        problems.append(Problem(where, what, _MERGE))
    for option in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(option) or {}
        if not isinstance(patterns, dict) or not all(map(_is_harmless, patterns)):
            problems.append(Problem(where, f"has the {option} {patterns!r:.80}, which is not read", _MERGE))
    return problems


def _is_harmless(pattern: str) -> bool:
    """Whether a regular expression can be matched in little time, whoever wrote it."""
    repeats = _QUANTIFIERS.findall(pattern)
    try:
        re.compile(pattern)
    except re.error:
        return False
    return len(pattern) < 1000 and len(repeats) <= 2 and not re.search(r"\)[*+?{]", pattern)


def _sorted_out(adapter: Checkpoint, problems: list[Problem]) -> tuple[dict[str, _Factors], dict[str, Tensor]]:
    """The factors by the module that they belong to, and the tensors that take the base's place."""
    halves: dict[str, dict[str, str]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        matched = _FACTOR.fullmatch(name)
        if matched:
            halves.setdefault(_module(matched[1]), {})[(matched[2] or "") + matched[3]] = name
        elif ".lora_" in name or "trainable_tokens" in name:
            problems.append(Problem(adapter.uri, "is no part of an adapter that is read", _MERGE, name))
        else:
            whole[name] = tensor
    factors = {}
    for module, found in halves.items():
        if found.keys() not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
            name = next(iter(found.values()))
            problems.append(Problem(adapter.uri, "is a factor without the other one", "Save the adapter again.", name))
            continue
        a, b = (found[key] for key in sorted(found))
        factors[module] = _Factors(a, b, "embedding_A" in found)
    return factors, whole


def _module(name: str) -> str:
    """A name in the adapter as the base has it."""
    return _INSIDE.sub("", name.removeprefix("base_model.model."))


class _Names:
    """The base's tensors by names that may be wrapped otherwise."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        bare = {name: bare_name(name) for name in self._names}
        counts = Counter(bare.values())
        self._by_bare_name = {core: name for name, core in bare.items() if counts[core] == 1}

    def find(self, name: str) -> str | None:
        return name if name in self._names else self._by_bare_name.get(bare_name(name))


def _no_base(adapter: Checkpoint, name: str, wanted: str) -> Problem:
    return Problem(adapter.uri, f"belongs to {wanted}, which the base lacks", _CHECK_BASE, name)


def _low_rank(base: Checkpoint, weight: Tensor, adapter: Checkpoint, module: str, pair: _Factors) -> LowRank | Problem:
    a, b = adapter.tensors[pair.a], adapter.tensors[pair.b]
    is_transposed = pair.is_embedding or bool(adapter.config.get("fan_in_fan_out"))
    rank = a.shape[0] if a.shape else 0
    scale = _scale(adapter.config, module, rank)
    outer = weight.shape[::-1] if is_transposed else weight.shape
    if len(outer) != 2 or (b.shape, a.shape) != ((outer[0], rank), (rank, outer[1])):
        what = f"has shape {list(a.shape)}, and {list(b.shape)} its fellow; the base's weight has {list(weight.shape)}"
        return Problem(adapter.uri, what, _CHECK_BASE, pair.a)
    if scale is None:
        what = f"says no rank of {rank} or no alpha for {module}"
        return Problem(adapter.path(ADAPTER_CONFIG), what, "Save the adapter again.")
    source = base.source(weight)
    if isinstance(source, LowRank):
        return Problem(adapter.uri, f"has two adapters for {module}", "Save the adapter again.", pair.a)
    for dtype in (a.dtype, b.dtype, source.dtype):
        if dtype not in ARITHMETIC:
            what = f"has factors {a.dtype} and {b.dtype} for a base in {weight.dtype}; read are {', '.join(ARITHMETIC)}"
            return Problem(adapter.uri, what, _MERGE, pair.a)
    first, second = map(adapter.stored, (a, b) if is_transposed else (b, a))
    rows, columns = weight.shape
    return LowRank(source, first, second, rank, rows, columns, scale, is_transposed)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float | None:
    """What B·A is multiplied by; None when the config does not say, or says another rank."""
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", module)
    if _of_module(config, "rank_pattern", "r", module) != rank or not rank:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _LARGEST_ALPHA:
        return None
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _of_module(config: Mapping[str, Any], patterns: str, default: str, module: str) -> object:
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config.get(default)
