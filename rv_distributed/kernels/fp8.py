"""FP8 weights with a scale for each block, compiled for the processor: see `rv_distributed.kernels.jit.fp8`."""

from __future__ import annotations

from typing import Final

from rv_distributed.kernels.entry import Entry

#: The largest number of E4M3.
LARGEST: Final = 448.0

dequantize: Final = Entry("fp8", "dequantize")
largest_of_blocks: Final = Entry("fp8", "largest_of_blocks")
quantize: Final = Entry("fp8", "quantize")
