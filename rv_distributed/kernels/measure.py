"""What a block tells, in torch: for GPUs. Counts are those of `strips`.

Nothing here waits for a GPU before `Measured.result`: a block is one queue of kernels, and one wait at its end.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor

from rv_distributed.kernels.rounding import to_nearest
from rv_distributed.measures import ULPS_FROM, Measures
from rv_distributed.recipe import Stats

#: By the bytes of an element: the integers that it is read as, and those that hold the difference of two of them; of
#: 64 bits only mostly.
_BITS: Final = {2: (torch.int16, torch.int32), 4: (torch.int32, torch.int64), 8: (torch.int64, torch.int64)}


class Measured(NamedTuple):
    """What was measured of a block, on the way from its device; with the elements themselves."""

    out: Tensor
    t: Tensor
    v: Tensor
    counts: Tensor
    """Elements that are not finite, those that are inexact, then what `_counts` gives; int64."""
    sums: Tensor
    """What `_sums` gives; float64."""

    def result(self) -> Measures:
        """The measures, once the device has done what was asked of it and before the block's tensors are used again."""
        nonfinite, inexact, *counts = self.counts.tolist()
        found = self._nonfinite() if nonfinite else Measures()
        sums = self.sums.tolist()
        if counts:
            nonzero, unchanged, absorbed, ulps_max, *at_least = counts
            v_max, v_sq, t_sq, *products = sums
            found = found._replace(
                v_sq=v_sq,
                t_sq=t_sq,
                v_max=v_max,
                nonzero=nonzero,
                changed=self.out.numel() - unchanged,
                absorbed=absorbed,
                ulps_max=ulps_max,
                inexact=inexact,
            )
            if products:
                v_t, moved_v, error_sq = products
                ulps = tuple(low - high for low, high in pairwise([*at_least, 0]))
                found = found._replace(v_t=v_t, moved_v=moved_v, error_sq=error_sq, ulps=ulps)
        return found

    def _nonfinite(self) -> Measures:
        infinite, where = torch.isinf(self.out), ~torch.isfinite(self.out)
        count = int(torch.count_nonzero(infinite))
        return Measures(
            overflowed=int(torch.count_nonzero(infinite & torch.isfinite(self.t) & torch.isfinite(self.v))),
            nan=int(torch.count_nonzero(where)) - count,
            infinite=count,
            first_nonfinite=int(torch.argmax(where.to(torch.uint8))),
        )


def measure(
    out: Tensor, target: Tensor, t: Tensor, v: Tensor, alpha: float, stats: Stats, *, inexact: Tensor | None = None
) -> Measured:
    """Measure ``out``, which was to be ``t + alpha·v``; ``t`` is ``target`` in the dtype of the arithmetic.

    ``inexact``, a tensor without dimensions, is the count of that name.
    """
    finite = torch.isfinite(out)
    zero = out.new_zeros((), dtype=torch.int64)
    counts = [torch.count_nonzero(~finite), zero if inexact is None else inexact]
    sums: list[Tensor] = []
    if stats != "none":
        counts += _counts(out, target, t, v, finite, alpha, stats)
        sums += _sums(out, t, v, alpha, stats)
    values = torch.stack(sums) if sums else out.new_empty(0, dtype=torch.float64)
    # From a GPU it goes to pinned memory, which is not waited for.
    counted, summed = (of.to("cpu", non_blocking=True) for of in (torch.stack(counts), values))
    return Measured(out, t, v, counted, summed)


def _counts(
    out: Tensor, target: Tensor, t: Tensor, v: Tensor, finite: Tensor, alpha: float, stats: Stats
) -> list[Tensor]:
    """Elements of v that are not 0; of out that are unchanged, and those of them that v should have moved; the most
    steps; and, for full statistics, how many elements moved by at least as many steps as `ULPS_FROM` says."""
    steps = _steps(target if target.dtype == out.dtype else to_nearest(t, torch.empty_like(out)), out)
    nonzero = v != 0
    same = (steps == 0) | (torch.isnan(out) & torch.isnan(t))
    # Between NaN or infinity and anything else there is no number of steps.
    steps = torch.where(finite & torch.isfinite(t), steps, 0)
    absorbed = torch.count_nonzero(same & nonzero)
    counts = [torch.count_nonzero(nonzero), torch.count_nonzero(same), absorbed if alpha else absorbed.zero_()]
    counts.append(steps.max().long())
    if stats == "full":
        counts += [torch.count_nonzero(steps >= least) for least in ULPS_FROM]
    return counts


def _sums(out: Tensor, t: Tensor, v: Tensor, alpha: float, stats: Stats) -> list[Tensor]:
    """max |v|, Σ v² and Σ t²; for full statistics Σ v·t, Σ (o − t)·v and Σ ((o − t) − αv)² as well."""
    low, high = torch.aminmax(v)
    t, v = t.double(), v.double()
    sums = [torch.maximum(-low, high).abs().double(), (v * v).sum(), (t * t).sum()]
    if stats == "full":
        moved = out.double() - t
        error = moved - alpha * v
        sums += [(v * t).sum(), (moved * v).sum(), (error * error).sum()]
    return sums


def _steps(one: Tensor, other: Tensor) -> Tensor:
    """How many numbers of their dtype two tensors' elements are apart."""
    here, there = _places(one), _places(other)
    apart = here - there
    # Numbers of 64 bits and of other signs may be too far apart to be counted.
    wrapped = ((here ^ there) & (here ^ apart)) < 0
    return apart.abs().masked_fill_(wrapped, torch.iinfo(apart.dtype).max)


def _places(values: Tensor) -> Tensor:
    """The place of every number in the sequence of all numbers of its dtype; those of both zeros are 0."""
    narrow, wide = _BITS[values.element_size()]
    bits = values.contiguous().view(narrow).to(wide)
    return torch.where(bits < 0, torch.iinfo(narrow).min - bits, bits)
