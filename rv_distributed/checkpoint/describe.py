"""What people are told of a checkpoint whose values are not simply its bytes."""

from __future__ import annotations

from rv_distributed.checkpoint.adapter import is_adapter, ranks_of
from rv_distributed.checkpoint.fp8 import FP8, fp8_scheme
from rv_distributed.checkpoint.model import Checkpoint
from rv_distributed.checkpoint.sources import Gathered
from rv_distributed.units import plural


def decoding_of(checkpoint: Checkpoint) -> str:
    """How its tensors are decoded, in words; empty where they are not."""
    texts = []
    scheme = fp8_scheme(checkpoint.config)
    if scheme is not None and FP8 in checkpoint.dtypes:
        texts.append(f"{scheme}, dequantized")
    if is_adapter(checkpoint):
        ranks = ranks_of(checkpoint)
        of = f" of rank {'/'.join(map(str, ranks))}" if ranks else ""
        texts.append(f"LoRA adapter{of}, added")
    parts = [len(tensor.source.boxes) for tensor in checkpoint.tensors.values() if isinstance(tensor.source, Gathered)]
    if parts:
        texts.append(f"{plural(len(parts), 'tensor')} in up to {max(parts)} parts, gathered")
    return "; ".join(texts)
