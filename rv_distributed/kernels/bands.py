"""A row of blocks of an FP8 tensor: its scales, its elements, and what is measured of them; on the processor.

The largest finite magnitude m of a block gives its scale: ``f = RN32(448 / m)``, ``s = RN32(1 / f)``, as transformers'
`Fp8Quantize` has it. Powers of 2 are rounded up from there, so that nothing is larger than 448; and a scale that is
stored in less than float32 is rounded before it is used: then ``f = RN32(1 / s)``. An element x becomes
``q = RN(RN32(x·f))`` in E4M3, at most 448, and is read as ``RN32(q·s)``. A block of what is next to 0 has the scale 1.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from rv_distributed.kernels import fp8, strips
from rv_distributed.measures import Measures
from rv_distributed.recipe import Stats

F32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]

#: A block whose largest magnitude is not above this is as good as zero: 448 divided by less might be no float32.
_NEXT_TO_NOTHING: Final = np.float32(2.0**-100)


class Band(NamedTuple):
    """A row of blocks in FP8."""

    elements: Bytes
    back: F32
    """What they are read as."""
    scales: bytes
    """As they are stored."""


def quantize(values: F32, columns: int, wide: int, scale_dtype: str, are_powers_of_2: bool, words: Words) -> Band:
    """Rows of ``columns`` values as blocks of ``wide`` columns.

    ``words`` are the random bits of stochastic rounding, one word a value, or empty for rounding to nearest. Scales are
    never rounded by chance.
    """
    most = np.empty(-(-columns // wide), np.float32)
    fp8.largest_of_blocks(values, columns, wide, most)
    forward, scales, raw = _scales(most, scale_dtype, are_powers_of_2)
    elements, back = np.empty(values.size, np.uint8), np.empty(values.size, np.float32)
    fp8.quantize(values, forward, scales, columns, wide, words, elements, back)
    return Band(elements, back, raw)


def _scales(most: F32, dtype: str, are_powers_of_2: bool) -> tuple[F32, F32, bytes]:
    """What blocks are multiplied by, what by when they are read, and that as it is stored."""
    one, largest = np.float32(1), np.float32(fp8.LARGEST)
    something: F32 = np.where(most > _NEXT_TO_NOTHING, most, largest)
    forward: F32 = largest / something
    scales: F32 = one / forward
    if are_powers_of_2 or dtype == "F8_E8M0":
        mantissa, exponent = np.frexp(scales)
        scales = np.ldexp(one, exponent - (mantissa == 0.5))
        forward = one / scales
    bits = scales.view(np.uint32)
    if dtype == "F32":
        return forward, scales, scales.tobytes()
    if dtype == "F8_E8M0":
        return forward, scales, (bits >> np.uint32(23)).astype(np.uint8).tobytes()
    # To nearest even in BF16: the sum carries into the upper half.
    upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    scales = (upper << np.uint32(16)).view(np.float32)
    forward = one / scales
    return forward, scales, upper.astype(np.uint16).tobytes()


def measure(band: Band, t: F32, v: F32, alpha: float, stats: Stats) -> Measures:
    """The measures of a band, which was to be ``t + alpha·v``. Without steps: numbers with different scales have no
    places in one sequence."""
    o = band.back
    nan = np.isnan(o)
    found = Measures()
    if nan.any():
        # There is no infinity in E4M3.
        found = Measures(nan=int(np.count_nonzero(nan)), first_nonfinite=int(np.argmax(nan)))
    if stats == "none":
        return found
    is_same = (o == t) | (nan & np.isnan(t))
    moves = v != 0
    sums = np.zeros(strips.SUMS)
    strips.all_sums(t, v, o, alpha, sums)
    v_sq, t_sq, v_t, moved_v, error_sq = sums.tolist()
    found = found._replace(
        v_sq=v_sq,
        t_sq=t_sq,
        v_max=float(np.abs(v).max()),
        nonzero=int(np.count_nonzero(moves)),
        changed=is_same.size - int(np.count_nonzero(is_same)),
        absorbed=int(np.count_nonzero(is_same & moves)) if alpha else 0,
    )
    return found if stats == "basic" else found._replace(v_t=v_t, moved_v=moved_v, error_sq=error_sq)
