"""The arithmetic and what is measured of it, compiled for the processor: the fast path.

Operands are raw bytes and the code of a dtype, so that one compilation serves every mixture of them. The code is in
`rv_distributed.kernels.jit`; here is what its callers need to know of it.
"""

from __future__ import annotations

from typing import Final

from rv_distributed.kernels.entry import Entry

#: Codes of dtypes, by their safetensors names.
CODES: Final = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3}
NO_TENSOR: Final = -1
#: Elements of a strip.
STRIP: Final = 2048
#: How much is measured.
NOTHING, BASIC, FULL = 0, 1, 2
#: Columns of sums.
V_SQ, T_SQ, V_T, MOVED_V, ERROR_SQ, SUMS = range(6)
#: Columns of counts; the last is the first of `ULPS`.
V_MAX_BITS, NONZERO, CHANGED, ABSORBED, ULPS_MAX, INEXACT, OVERFLOWED, NAN, INFINITE, FIRST, ULPS = range(11)
COUNTS: Final = ULPS + 8

combine_blocks: Final = Entry("blocks", "combine_blocks")
noise: Final = Entry("combine", "noise")
all_sums: Final = Entry("combine", "all_sums")
