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

from rv_distributed.kernels import fp8
from rv_distributed.measures import Measures
from rv_distributed.recipe import Stats

F32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]

#: In which scales can be written.
SCALE_DTYPES: Final = ("F32", "BF16", "F8_E8M0")
#: A block whose largest magnitude is not above this is as good as zero: 448 divided by less might be no float32.
_NEXT_TO_NOTHING: Final = np.float32(2.0**-100)
#: What is measured at a time, to keep temporaries small.
_SLICE: Final = 1 << 16


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
    total = Measures()
    for start in range(0, t.size, _SLICE):
        part = slice(start, start + _SLICE)
        total = total.plus(_measure(band.back[part], t[part], v[part], alpha, stats).moved(start))
    return total


def _measure(o: F32, t: F32, v: F32, alpha: float, stats: Stats) -> Measures:
    nan = np.isnan(o)
    found = Measures()
    if nan.any():
        # There is no infinity in E4M3.
        found = Measures(nan=int(np.count_nonzero(nan)), first_nonfinite=int(np.argmax(nan)))
    if stats == "none":
        return found
    with np.errstate(all="ignore"):
        changed = (o != t) & ~(nan & np.isnan(t))
        nonzero = v != 0
        o64, t64, v64 = (values.astype(np.float64) for values in (o, t, v))
        found = found._replace(
            v_sq=float(v64 @ v64),
            t_sq=float(t64 @ t64),
            v_max=float(np.abs(v).max()),
            nonzero=int(np.count_nonzero(nonzero)),
            changed=int(np.count_nonzero(changed)),
            absorbed=int(np.count_nonzero(nonzero & ~changed)) if alpha else 0,
        )
        if stats == "basic":
            return found
        moved = o64 - t64
        error = moved - alpha * v64
        return found._replace(v_t=float(v64 @ t64), moved_v=float(moved @ v64), error_sq=float(error @ error))
