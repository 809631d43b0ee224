"""``O = T + Σ αₖ·dₖ`` and ``V = d``, with ``d = A − B``, one block at a time.

Specified to the bit, with RN = round to nearest even in float32 or, if asked for, in float64: ``d = RN(a − b)``;
``acc = t``; for each vector in order ``acc = RN(acc + RN(αₖ·dₖ))``; one rounding to the output's dtype at the
end, which is `Rounder`'s. Multiplication and addition stay separate operations: a fused multiply-add would skip a
rounding, and not every device would do it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from rv_distributed.kernels.rounding import Rounder
from rv_distributed.measures import Measures
from rv_distributed.recipe import Arithmetic

_COMPUTE_DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}
TORCH_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS: Final = {2: torch.int16, 4: torch.int32}
#: Squares below this leave float32's normal range, and sums of them lose what they should measure.
_SMALL: Final = 1e-15
#: What cannot round to infinity, with room for the error of the bound that is compared with it.
_SAFE: Final = {dtype: 0.99 * torch.finfo(dtype).max for dtype in TORCH_DTYPES.values()}


class Combiner:
    """Scratch space for one thread on one device, and the arithmetic over it.

    ``weighted`` says what ``v`` is where it is measured: the weighted sum of several vectors, ``acc − t``, or
    else the one vector, ``d``.
    """

    def __init__(
        self,
        *,
        block_elements: int,
        outputs: int,
        device: torch.device,
        measure: bool,
        weighted: bool,
        arithmetic: Arithmetic,
    ) -> None:
        self.block_elements = block_elements
        self._measure = measure
        self._weighted = weighted
        self._rounder = Rounder(arithmetic, block_elements=block_elements, device=device)
        dtype = _COMPUTE_DTYPES[arithmetic.compute_dtype]
        self._scratch = [torch.empty(block_elements, dtype=dtype, device=device) for _ in range(4 + outputs)]
        self._parts = self._scratch

    def combine(
        self,
        outs: Sequence[Tensor],
        target: Tensor,
        vectors: Sequence[tuple[Tensor, Tensor | None]],
        alphas: Sequence[Sequence[float]],
        *,
        name: str,
        first: int,
    ) -> list[Measures]:
        """Fill each of ``outs`` with ``target + Σ αₖ·vₖ``, with its own row of ``alphas``.

        All tensors have one dimension and the same length, at most ``block_elements``; their dtypes are
        float32, bfloat16 or float16 in any mixture. An output whose alphas are all 0 gets the target's
        own values, unmeasured. They are the elements from ``first`` of the tensor ``name``, on which stochastic
        rounding depends. Returns the measures of each output.
        """
        for_t, _, _, product, *accs = self._cut_scratch(target)
        t = _widened(target, for_t)
        started = [False] * len(outs)
        d = t
        for index, (plus, minus) in enumerate(vectors):
            d = self.difference(plus, minus)
            for number, row in enumerate(alphas):
                alpha, acc = row[index], accs[number]
                if alpha == 0.0:
                    continue
                # At α = 1 the product would be d itself.
                weighted = d if alpha == 1.0 else torch.mul(d, alpha, out=product)
                torch.add(acc if started[number] else t, weighted, out=acc)
                started[number] = True
        for out, acc, used in zip(outs, accs, started, strict=True):
            if used or out.dtype != target.dtype:
                self._rounder.round(acc if used else t, out, name=name, first=first)
            else:
                out.copy_(target)
        if not self._measure:
            return [Measures()] * len(outs)
        t_sq = _sum_of_squares(t)
        t_max = math.sqrt(t_sq)
        v_sq, v_max = (0.0, 0.0) if self._weighted else _size(d)
        measures = []
        for out, acc, used, row in zip(outs, accs, started, alphas, strict=True):
            if not used:
                measures.append(Measures(0.0, t_sq, 0.0, 0, 0, *_find_nonfinite(out, t_max)))
                continue
            if self._weighted:
                v_sq, v_max = _size(torch.sub(acc, t, out=product))
            reach = t_max + v_max * (1.0 if self._weighted else abs(row[0]))
            changed = _count_changed(out, target, t, product)
            measures.append(Measures(v_sq, t_sq, v_max, changed, 0, *_find_nonfinite(out, reach)))
        return measures

    def extract(self, out: Tensor, plus: Tensor, minus: Tensor | None, *, name: str, first: int) -> Measures:
        """Fill ``out`` with ``plus − minus``; ``name`` and ``first`` as of `combine`."""
        d = self.difference(plus, minus)
        # Under another name than `combine`'s: what is rounded by the same bits twice is not right on average.
        self._rounder.round(d, out, name=f"vector of {name}", first=first)
        if not self._measure:
            return Measures()
        v_sq, v_max = _size(d)
        inexact = 0
        if out.dtype != d.dtype:
            stored = self._parts[3].copy_(out)
            inexact = int(torch.count_nonzero(stored.ne(d) & ~(stored.isnan() & d.isnan())))
        changed = int(torch.count_nonzero(d))
        return Measures(v_sq, 0.0, v_max, changed, inexact, *_find_nonfinite(out, v_max))

    def difference(self, plus: Tensor, minus: Tensor | None) -> Tensor:
        """``RN(plus − minus)``; valid until the next call."""
        _, for_plus, for_minus, *_ = self._cut_scratch(plus)
        if minus is None:
            return _widened(plus, for_plus)
        return torch.sub(_widened(plus, for_plus), _widened(minus, for_minus), out=for_plus)

    def _cut_scratch(self, like: Tensor) -> list[Tensor]:
        """Scratch of this length; cut anew only when the length changes, which it does at tensors' borders."""
        count = like.numel()
        if self._parts[0].numel() != count:
            self._parts = [scratch[:count] for scratch in self._scratch]
        return self._parts


def _widened(values: Tensor, scratch: Tensor) -> Tensor:
    """The values in the dtype of the scratch, which the arithmetic is done in."""
    return values if values.dtype == scratch.dtype else scratch.copy_(values)


def _count_changed(out: Tensor, target: Tensor, t: Tensor, scratch: Tensor) -> int:
    if out.dtype != target.dtype:
        return int(torch.count_nonzero(scratch.copy_(out).ne(t)))
    # Bits, not values: this tells −0 from 0, and a NaN from itself only when its payload changed.
    bits = _BITS[out.element_size()]
    return _count_different(out.view(bits), target.view(bits), scratch)


def _find_nonfinite(values: Tensor, reach: float) -> tuple[int, int | None]:
    """How many of ``values`` are NaN or infinite, and the index of the first.

    ``reach`` bounds them before they were rounded, NaN where something was NaN; it nearly always tells that
    there are none.
    """
    if reach <= _SAFE[values.dtype]:
        return 0, None
    nonfinite = ~torch.isfinite(values)
    count = int(torch.count_nonzero(nonfinite))
    return count, int(torch.argmax(nonfinite.to(torch.uint8))) if count else None


def _count_different(one: Tensor, other: Tensor, scratch: Tensor) -> int:
    different = scratch.view(torch.bool)[: one.numel()]
    if one.is_cpu:
        # Several times as fast as torch's comparison.
        np.not_equal(one.numpy(), other.numpy(), out=different.numpy())
        return int(np.count_nonzero(different.numpy()))
    return int(torch.count_nonzero(torch.ne(one, other, out=different)))


def _size(v: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(v)
    largest = max(-low.item(), high.item())
    return _sum_of_squares(v, largest), largest


def _sum_of_squares(values: Tensor, largest: float = math.inf) -> float:
    total = torch.dot(values, values).item()
    if math.isfinite(total) and (total > _SMALL or largest == 0.0):
        return total
    wide = values.double()
    return torch.dot(wide, wide).item()
