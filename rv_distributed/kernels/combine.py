"""``O = T + Σ αₖ·dₖ`` and ``V = d``, with ``d = A − B``, one block at a time.

Specified to the bit, with RN = round to nearest even in float32 or, if asked for, in float64: ``d = RN(a − b)``;
``acc = t``; for each vector in order ``acc = RN(acc + RN(αₖ·dₖ))``; one rounding to the output's dtype at the
end, which is `Rounder`'s. Multiplication and addition stay separate operations: a fused multiply-add would skip a
rounding, and not every device would do it.

In the order ``sum`` it is ``v = RN(v + RN(αₖ·dₖ))`` from 0, and then ``RN(t + RN(RN(v / divisor)·scale))``. ``fused``
has ``v = RN32(RN64(v + αₖ·dₖ))``: a fused multiply-add up to one element in 10⁸, which every device does alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from rv_distributed.kernels.measure import Measured, measure
from rv_distributed.kernels.rounding import Rounder
from rv_distributed.recipe import Arithmetic, Stats, Weights

_COMPUTE_DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}
TORCH_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class Combiner:
    """Scratch space for one thread on one device, and the arithmetic over it.

    ``weighted`` says what is measured as ``v``: the weighted sum of the vectors, or the one vector that there is.
    """

    def __init__(
        self,
        *,
        block_elements: int,
        outputs: int,
        device: torch.device,
        weighted: bool,
        stats: Stats,
        arithmetic: Arithmetic,
    ) -> None:
        self.block_elements = block_elements
        self._stats = stats
        self._weighted = weighted
        self._order = arithmetic.order
        self._rounder = Rounder(arithmetic, block_elements=block_elements, device=device)
        dtype = _COMPUTE_DTYPES[arithmetic.compute_dtype]
        # For t, two operands and a product, and for each output its sum and its vector.
        self._scratch = [torch.empty(block_elements, dtype=dtype, device=device) for _ in range(4 + 2 * outputs)]
        self._parts = self._scratch

    def combine(
        self,
        outs: Sequence[Tensor],
        target: Tensor | None,
        vectors: Sequence[tuple[Tensor, Tensor | None]],
        weights: Sequence[Weights],
        *,
        name: str,
        first: int,
    ) -> list[Measured]:
        """Fill each of ``outs`` with ``target + Σ αₖ·vₖ``, with its own ``weights``.

        All tensors have one dimension and the same length, at most ``block_elements``; their dtypes are
        float32, bfloat16, float16 or float64 in any mixture. An output whose alphas are all 0 gets the target's
        own values. Without a target, which goes with the orders ``sum`` and ``fused`` only, it is 0. They are the
        elements from ``first`` of the tensor ``name``, on which stochastic rounding depends. Returns what is measured
        of each output.
        """
        if target is None or (self._order != "each" and vectors):
            return self._combine_sums(outs, target, vectors, weights, name=name, first=first)
        for_t, d, _, product, *rest = self._cut_scratch(target)
        accs, sums = rest[: len(outs)], rest[len(outs) : 2 * len(outs)]
        t = _widened(target, for_t)
        started = [False] * len(outs)
        for index, (plus, minus) in enumerate(vectors):
            d = self.difference(plus, minus)
            for number, of in enumerate(weights):
                alpha, acc, v = of.alphas[index], accs[number], sums[number]
                if index == 0 and self._weighted:
                    v.zero_()
                if alpha == 0.0:
                    continue
                # At α = 1 the product would be d itself.
                weighted = d if alpha == 1.0 else torch.mul(d, alpha, out=product)
                torch.add(acc if started[number] else t, weighted, out=acc)
                if self._weighted:
                    v.add_(weighted)
                started[number] = True
        for out, acc, used in zip(outs, accs, started, strict=True):
            if used or out.dtype != target.dtype:
                self._rounder.round(acc if used else t, out, name=name, first=first)
            else:
                out.copy_(target)
        if not vectors:
            return [measure(out, target, t, t, 1.0, "none") for out in outs]
        scales = [1.0 if self._weighted else of.alphas[0] for of in weights]
        return [
            measure(out, target, t, v if self._weighted else d, alpha, self._stats)
            for out, v, alpha in zip(outs, sums, scales, strict=True)
        ]

    def _combine_sums(
        self,
        outs: Sequence[Tensor],
        target: Tensor | None,
        vectors: Sequence[tuple[Tensor, Tensor | None]],
        weights: Sequence[Weights],
        *,
        name: str,
        first: int,
    ) -> list[Measured]:
        """As `combine`, with the vectors added to each other first."""
        for_t, _, _, product, *rest = self._cut_scratch(vectors[0][0])
        accs, sums = rest[: len(outs)], rest[len(outs) : 2 * len(outs)]
        t = for_t.zero_() if target is None else _widened(target, for_t)
        for index, (plus, minus) in enumerate(vectors):
            d = self.difference(plus, minus)
            for of, v in zip(weights, sums, strict=True):
                if index == 0:
                    v.zero_()
                if (alpha := of.alphas[index]) != 0.0:
                    self._add_scaled(v, d, alpha, product)
        measures = []
        for out, of, acc, v in zip(outs, weights, accs, sums, strict=True):
            # By a tensor: on CUDA torch divides by a number of Python's as it multiplies with its reciprocal.
            v.div_(torch.full_like(v[:1], of.divisor)).mul_(of.scale)
            base = out.new_zeros(()).expand_as(out) if target is None else target
            if target is not None and out.dtype == target.dtype and not of.moves:
                out.copy_(target)
            else:
                total, label = (v, f"vector of {name}") if target is None else (torch.add(t, v, out=acc), name)
                self._rounder.round(total, out, name=label, first=first)
            measures.append(measure(out, base, t, v, 1.0, self._stats))
        return measures

    def _add_scaled(self, v: Tensor, d: Tensor, alpha: float, product: Tensor) -> None:
        if self._order == "fused" and d.dtype == torch.float32:
            # Float64 holds every product of two float32.
            v.copy_(torch.mul(d.double(), alpha).add_(v.double()))
        else:
            v.add_(torch.mul(d, alpha, out=product))

    def extract(self, out: Tensor, plus: Tensor, minus: Tensor | None, *, name: str, first: int) -> Measured:
        """Fill ``out`` with ``plus − minus``; ``name`` and ``first`` as of `combine`."""
        d = self.difference(plus, minus)
        # Under another name than `combine`'s: what is rounded by the same bits twice is not right on average.
        self._rounder.round(d, out, name=f"vector of {name}", first=first)
        zero, _, _, stored, *_ = self._cut_scratch(plus)
        if self._stats == "none" or out.dtype == d.dtype:
            inexact = None
        else:
            stored.copy_(out)
            inexact = torch.count_nonzero(stored.ne(d) & ~(stored.isnan() & d.isnan()))
        base = out.new_zeros(()).expand_as(out)
        return measure(out, base, zero.zero_(), d, 1.0, self._stats, inexact=inexact)

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
