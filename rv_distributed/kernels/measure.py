"""What a block tells, in torch: for GPUs, and for arithmetic that is not compiled. Counts are those of `strips`."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from rv_distributed.measures import ULPS_FROM, Measures
from rv_distributed.recipe import Stats

#: Temporaries are made for this many elements at a time on a processor, to keep them few and in the caches.
_SLICE: Final = 1 << 16
_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_STEPS: Final = torch.iinfo(torch.int64).max


def measure(out: Tensor, target: Tensor, t: Tensor, v: Tensor, alpha: float, stats: Stats) -> Measures:
    """The measures of ``out``, which was to be ``t + alpha·v``; ``t`` is ``target`` in the dtype of the arithmetic."""
    total = Measures()
    size = out.numel() if out.is_cuda else _SLICE
    for start in range(0, out.numel(), size):
        part = slice(start, start + size)
        total = total.plus(_measure(out[part], target[part], t[part], v[part], alpha, stats).moved(start))
    return total


def _measure(out: Tensor, target: Tensor, t: Tensor, v: Tensor, alpha: float, stats: Stats) -> Measures:
    finite = torch.isfinite(out)
    found = Measures() if bool(finite.all()) else _nonfinite(out, ~finite, t, v)
    if stats == "none":
        return found
    low, high = torch.aminmax(v)
    steps = _steps(target if target.dtype == out.dtype else t.to(out.dtype), out)
    nonzero = v != 0
    same = (steps == 0) | (torch.isnan(out) & torch.isnan(t))
    # Between NaN or infinity and anything else there is no number of steps.
    steps = torch.where(finite & torch.isfinite(t), steps, 0)
    found = found._replace(
        v_sq=_dot(v, v),
        t_sq=_dot(t, t),
        v_max=max(-low.item(), high.item()),
        nonzero=int(torch.count_nonzero(nonzero)),
        changed=same.numel() - int(torch.count_nonzero(same)),
        absorbed=int(torch.count_nonzero(same & nonzero)) if alpha else 0,
        ulps_max=int(steps.max()),
    )
    if stats == "basic":
        return found
    moved = out.double() - t.double()
    error = moved - alpha * v.double()
    at_least = [*(int(torch.count_nonzero(steps >= least)) for least in ULPS_FROM), 0]
    return found._replace(
        v_t=_dot(v, t),
        moved_v=_dot(moved, v),
        error_sq=_dot(error, error),
        ulps=tuple(low - high for low, high in pairwise(at_least)),
    )


def _nonfinite(out: Tensor, where: Tensor, t: Tensor, v: Tensor) -> Measures:
    infinite = torch.isinf(out)
    count = int(torch.count_nonzero(infinite))
    return Measures(
        overflowed=int(torch.count_nonzero(infinite & torch.isfinite(t) & torch.isfinite(v))),
        nan=int(torch.count_nonzero(where)) - count,
        infinite=count,
        first_nonfinite=int(torch.argmax(where.to(torch.uint8))),
    )


def _steps(one: Tensor, other: Tensor) -> Tensor:
    """How many numbers of their dtype two tensors' elements are apart."""
    here, there = _places(one), _places(other)
    apart = here - there
    # Numbers of 64 bits and of other signs may be too far apart to be counted.
    wrapped = ((here ^ there) & (here ^ apart)) < 0
    return apart.abs().masked_fill_(wrapped, _MOST_STEPS)


def _places(values: Tensor) -> Tensor:
    """The place of every number in the sequence of all numbers of its dtype; those of both zeros are 0."""
    bits = values.contiguous().view(_BITS[values.element_size()]).long()
    return torch.where(bits < 0, torch.iinfo(_BITS[values.element_size()]).min - bits, bits)


def _dot(one: Tensor, other: Tensor) -> float:
    return torch.dot(one.double(), other.double()).item()
