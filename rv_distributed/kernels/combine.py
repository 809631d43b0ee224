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

from rv_distributed.kernels.measure import measure
from rv_distributed.kernels.rounding import Rounder
from rv_distributed.measures import Measures
from rv_distributed.recipe import Arithmetic, Stats, Weights

_COMPUTE_DTYPES: Final = {"float32": torch.float32, "float64": torch.float64}
TORCH_DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


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
    ) -> list[Measures]:
        """Fill each of ``outs`` with ``target + Σ αₖ·vₖ``, with its own ``weights``.

        All tensors have one dimension and the same length, at most ``block_elements``; their dtypes are
        float32, bfloat16 or float16 in any mixture. An output whose alphas are all 0 gets the target's
        own values. Without a target, which goes with the orders ``sum`` and ``fused`` only, it is 0. They are the
        elements from ``first`` of the tensor ``name``, on which stochastic rounding depends. Returns the measures of
        each output.
        """
        like = vectors[0][0] if target is None else target
        for_t, d, _, product, *rest = self._cut_scratch(like)
        accs, sums = rest[: len(outs)], rest[len(outs) : 2 * len(outs)]
        t = for_t.zero_() if target is None else _widened(target, for_t)
        for index, (plus, minus) in enumerate(vectors):
            d = self.difference(plus, minus)
            for of, acc, v in zip(weights, accs, sums, strict=True):
                alpha = of.alphas[index]
                if index == 0:
                    acc.copy_(t)
                    v.zero_()
                if alpha == 0.0:
                    continue
                if self._order == "fused" and d.dtype == torch.float32:
                    # Float64 holds every product of two float32.
                    v.copy_(torch.mul(d.double(), alpha).add_(v.double()))
                    continue
                # At α = 1 the product would be d itself.
                weighted = d if alpha == 1.0 else torch.mul(d, alpha, out=product)
                if self._order == "each":
                    acc.add_(weighted)
                if self._weighted:
                    v.add_(weighted)
        if self._order != "each" and vectors:
            for of, acc, v in zip(weights, accs, sums, strict=True):
                v.div_(of.divisor).mul_(of.scale)
                _ = acc.copy_(v) if target is None else acc.add_(v)
        for out, of, acc in zip(outs, weights, accs, strict=True):
            if target is not None and not of.moves and out.dtype == target.dtype:
                out.copy_(target)
            else:
                label = name if target is not None else f"vector of {name}"
                self._rounder.round(acc if vectors else t, out, name=label, first=first)
        if not vectors:
            return [measure(out, like, t, t, 1.0, "none") for out in outs]
        scales = [1.0 if self._weighted else of.alphas[0] for of in weights]
        zeros = [out.new_zeros(()).expand_as(out) if target is None else target for out in outs]
        return [
            measure(out, zero, t, v if self._weighted else d, alpha, self._stats)
            for out, zero, v, alpha in zip(outs, zeros, sums, scales, strict=True)
        ]

    def extract(self, out: Tensor, plus: Tensor, minus: Tensor | None, *, name: str, first: int) -> Measures:
        """Fill ``out`` with ``plus − minus``; ``name`` and ``first`` as of `combine`."""
        d = self.difference(plus, minus)
        # Under another name than `combine`'s: what is rounded by the same bits twice is not right on average.
        self._rounder.round(d, out, name=f"vector of {name}", first=first)
        zero, _, _, stored, *_ = self._cut_scratch(plus)
        found = measure(out, out.new_zeros(()).expand_as(out), zero.zero_(), d, 1.0, self._stats)
        if self._stats == "none" or out.dtype == d.dtype:
            return found
        stored.copy_(out)
        return found._replace(inexact=int(torch.count_nonzero(stored.ne(d) & ~(stored.isnan() & d.isnan()))))

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
