"""The arithmetic: combine, round, measure.

Written twice, to the same bits: `strips` is compiled for the processor and does what runs usually need; `combine`,
`rounding`, `noise` and `measure`, in torch, do everything, on GPUs too. One set of tests holds both.
"""
