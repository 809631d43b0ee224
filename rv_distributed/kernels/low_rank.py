"""Low-rank adapters, compiled for the processor: see `rv_distributed.kernels.jit.low_rank`."""

from __future__ import annotations

from typing import Final

from rv_distributed.kernels.entry import Entry

#: Columns that are worked on at a time: with them, a factor of rank 64 is 256 KiB.
STRIP: Final = 1024

add_low_rank: Final = Entry("low_rank", "add_low_rank")
