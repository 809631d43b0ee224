"""What Numba compiles. Imported only where there is no machine code of it yet: see `rv_distributed.kernels.entry`."""
