"""The arithmetic, in torch: combine and measure, the same code on CPU and CUDA."""

from rv_distributed.kernels.combine import Combiner

__all__ = ["Combiner"]
