"""The kernels, each behind one call, for tests that hold all of them to the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from reference import ITEM_BYTES, Raw

from rv_distributed.kernels.combine import TORCH_DTYPES, Combiner
from rv_distributed.kernels.compiled import CompiledCombiner, RawOperand
from rv_distributed.measures import Measures
from rv_distributed.recipe import Arithmetic, Stats, Weights

Vectors = Sequence[tuple[Raw, Raw | None]]
Made = tuple[list[Raw], list[Measures]]
DEFAULT = Arithmetic("float32", "nearest", 0)


class ByTorch:
    """The torch kernels, on the processor or on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def run(
        self,
        target: Raw | None,
        vectors: Vectors,
        rows: Sequence[Weights],
        dtypes: Sequence[str],
        *,
        stats: Stats = "full",
        arithmetic: Arithmetic = DEFAULT,
        first: int = 0,
        weighted: bool = False,
    ) -> Made:
        """Compute an output for each row of weights, in its dtype, of the tensor ``x`` from element ``first``."""
        (count,) = vectors[0][0].shape if target is None else target.shape
        combiner = Combiner(
            block_elements=count,
            outputs=len(rows),
            device=self._device,
            weighted=weighted or len(vectors) > 1,
            stats=stats,
            arithmetic=arithmetic,
        )
        outs = [torch.empty(count, dtype=TORCH_DTYPES[dtype], device=self._device) for dtype in dtypes]
        operands = [(self._load(plus), self._load(minus) if minus else None) for plus, minus in vectors]
        if target is None and arithmetic.order == "each":
            measured = [combiner.extract(outs[0], *operands[0], name="x", first=first)]
        else:
            t = self._load(target) if target else None
            measured = combiner.combine(outs, t, operands, rows, name="x", first=first)
            assert t is None or target is None or _bytes_of(t) == target.data, "an input was written to"
        raws = [Raw(dtype, (count,), _bytes_of(out)) for dtype, out in zip(dtypes, outs, strict=True)]
        return raws, [of_output.result() for of_output in measured]

    def _load(self, raw: Raw) -> torch.Tensor:
        return torch.frombuffer(bytearray(raw.data), dtype=TORCH_DTYPES[raw.dtype]).to(self._device)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().view(torch.uint8).numpy().tobytes()


class Compiled:
    """The compiled kernel, with operands at odd addresses and at even ones."""

    def run(
        self,
        target: Raw | None,
        vectors: Vectors,
        rows: Sequence[Weights],
        dtypes: Sequence[str],
        *,
        stats: Stats = "full",
        arithmetic: Arithmetic = DEFAULT,
        first: int = 0,
        weighted: bool = False,
    ) -> Made:
        """As of `ByTorch`."""
        arena = bytearray(3)

        def place(raw: Raw) -> RawOperand:
            at = len(arena)
            arena.extend(raw.data)
            return RawOperand(at, raw.dtype)

        placed = place(target) if target is not None else None
        operands = [(place(plus), place(minus) if minus else None) for plus, minus in vectors]
        (count,) = vectors[0][0].shape if target is None else target.shape
        raws, measures = [], []
        # All outputs of one call have one dtype.
        for dtype in dict.fromkeys(dtypes):
            of_dtype = [row for row, other in zip(rows, dtypes, strict=True) if other == dtype]
            combiner = CompiledCombiner(
                outputs=len(of_dtype), weighted=weighted or len(vectors) > 1, stats=stats, arithmetic=arithmetic
            )
            margin = 4 * ITEM_BYTES[dtype]
            outs = np.full((len(of_dtype), count * ITEM_BYTES[dtype] + 2 * margin), 77, np.uint8)
            before = bytes(arena)
            view = np.frombuffer(arena, np.uint8)
            (made,) = combiner.compute(
                view, placed, operands, of_dtype, outs, margin, dtype, name="x", first=first, sizes=[count]
            )
            measures += made
            assert bytes(arena) == before, "an input was written to"
            assert np.all(outs[:, :margin] == 77)
            assert np.all(outs[:, -margin:] == 77)
            raws += [Raw(dtype, (count,), out[margin:-margin].tobytes()) for out in outs]
        return raws, measures


Kernel = ByTorch | Compiled
HERE: dict[str, Kernel] = {"torch": ByTorch("cpu"), "compiled": Compiled()}
#: With a GPU, where there is one.
KERNELS = [
    *(pytest.param(kernel, id=name) for name, kernel in HERE.items()),
    pytest.param(ByTorch("cuda"), id="cuda", marks=pytest.mark.gpu),
]
