"""The arithmetic: combine, round, measure.

Written twice, to the same bits: `strips` is compiled for the processor; `combine`, `rounding`, `noise` and `measure`
are in torch, for GPUs. One set of tests holds both. What is written as FP8 again is summed a third time, in NumPy, by
`rv_distributed.runtime.requantize`.
"""
