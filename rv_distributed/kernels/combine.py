"""``O = T + Σ αₖ·dₖ`` and ``V = d``, with ``d = A − B``, one block at a time.

Specified to the bit, with RN32 = round to nearest even in float32: ``d = RN32(a − b)``; ``acc = t``; for
each vector in order ``acc = RN32(acc + RN32(αₖ·dₖ))``; one rounding to the output's dtype at the end.
Multiplication and addition stay separate operations: a fused multiply-add would skip a rounding, and not
every device would do it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from rv_distributed.measures import Measures

TORCH_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS: Final = {2: torch.int16, 4: torch.int32}
#: Squares below this leave float32's normal range, and sums of them lose what they should measure.
_SMALL: Final = 1e-15


class Combiner:
    """Scratch space for one thread on one device, and the arithmetic over it.

    ``weighted`` says what ``v`` is where it is measured: the weighted sum of several vectors, ``acc − t``, or
    else the one vector, ``d``.
    """

    def __init__(
        self, *, block_elements: int, outputs: int, device: torch.device, measure: bool, weighted: bool
    ) -> None:
        self.block_elements = block_elements
        self._measure = measure
        self._weighted = weighted
        self._scratch = [torch.empty(block_elements, device=device) for _ in range(4 + outputs)]

    def combine(
        self,
        outs: Sequence[Tensor],
        target: Tensor,
        vectors: Sequence[tuple[Tensor, Tensor | None]],
        alphas: Sequence[Sequence[float]],
    ) -> list[Measures]:
        """Fill each of ``outs`` with ``target + Σ αₖ·vₖ``, with its own row of ``alphas``.

        All tensors have one dimension and the same length, at most ``block_elements``; their dtypes are
        float32, bfloat16 or float16 in any mixture. An output whose alphas are all 0 gets the target's
        own values, unmeasured. Returns the measures of each output.
        """
        t = self._float(target, 0)
        used = [any(row) for row in alphas]
        accs = [self._part(4 + index, target) for index in range(len(outs))]
        started = [False] * len(outs)
        d = t
        for index, (plus, minus) in enumerate(vectors):
            d = self.difference(plus, minus)
            for number, row in enumerate(alphas):
                if row[index] == 0.0:
                    continue
                if started[number]:
                    accs[number].add_(torch.mul(d, row[index], out=self._part(3, target)))
                else:
                    torch.mul(d, row[index], out=accs[number]).add_(t)
                    started[number] = True
        for out, acc, is_used in zip(outs, accs, used, strict=True):
            out.copy_(acc if is_used else target)
        if not self._measure:
            return [Measures()] * len(outs)
        t_sq = _sum_of_squares(t)
        v_sq, v_max = (0.0, 0.0) if self._weighted else _size(d)
        measures = []
        for out, acc, is_used in zip(outs, accs, used, strict=True):
            if is_used and self._weighted:
                v_sq, v_max = _size(torch.sub(acc, t, out=self._part(3, target)))
            changed = self._changed(out, target, t) if is_used else 0
            measures.append(Measures(v_sq, t_sq, v_max, changed, 0) if is_used else Measures(0.0, t_sq))
        return measures

    def extract(self, out: Tensor, plus: Tensor, minus: Tensor | None) -> Measures:
        """Fill ``out`` with ``plus − minus``."""
        d = self.difference(plus, minus)
        out.copy_(d)
        if not self._measure:
            return Measures()
        v_sq, v_max = _size(d)
        inexact = 0
        if out.dtype != torch.float32:
            stored = self._part(3, out).copy_(out)
            inexact = int(torch.count_nonzero(stored.ne(d) & ~(stored.isnan() & d.isnan())))
        return Measures(v_sq, 0.0, v_max, int(torch.count_nonzero(d)), inexact)

    def difference(self, plus: Tensor, minus: Tensor | None) -> Tensor:
        """``RN32(plus − minus)`` in float32; valid until the next call."""
        if minus is None:
            return self._float(plus, 1)
        return torch.sub(self._float(plus, 1), self._float(minus, 2), out=self._part(1, plus))

    def _float(self, values: Tensor, scratch: int) -> Tensor:
        return values if values.dtype == torch.float32 else self._part(scratch, values).copy_(values)

    def _part(self, scratch: int, like: Tensor) -> Tensor:
        return self._scratch[scratch][: like.numel()]

    def _changed(self, out: Tensor, target: Tensor, t: Tensor) -> int:
        if out.dtype != target.dtype:
            return int(torch.count_nonzero(self._part(3, out).copy_(out).ne(t)))
        # Comparing bits as integers is several times faster than torch.ne, and tells −0 from 0 as well.
        bits = _BITS[out.element_size()]
        different = self._part(3, out).view(bits)[: out.numel()]
        return int(torch.count_nonzero(torch.bitwise_xor(out.view(bits), target.view(bits), out=different)))


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
