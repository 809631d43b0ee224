"""Copying boxes into their tensors, compiled for the processor: see `rv_distributed.kernels.jit.gather`."""

from __future__ import annotations

from typing import Final

from rv_distributed.kernels.entry import Entry

copy_runs: Final = Entry("gather", "copy_runs")
