"""The dtypes of the safetensors format, by the names that its headers use."""

from __future__ import annotations

from typing import Final, NamedTuple


class DType(NamedTuple):
    """One safetensors dtype."""

    name: str
    """As written in headers, for instance ``BF16``."""
    bits: int
    """Bits an element; fewer than 8 for the packed formats."""
    is_float: bool
    """Whether elements are floating-point numbers, of any width."""


_TABLE: Final = (
    DType("BOOL", 8, False),
    DType("F4", 4, True),
    DType("F6_E2M3", 6, True),
    DType("F6_E3M2", 6, True),
    DType("U8", 8, False),
    DType("I8", 8, False),
    DType("F8_E5M2", 8, True),
    DType("F8_E4M3", 8, True),
    DType("F8_E8M0", 8, True),
    DType("F8_E4M3FNUZ", 8, True),
    DType("F8_E5M2FNUZ", 8, True),
    DType("I16", 16, False),
    DType("U16", 16, False),
    DType("F16", 16, True),
    DType("BF16", 16, True),
    DType("I32", 32, False),
    DType("U32", 32, False),
    DType("F32", 32, True),
    DType("C64", 64, True),
    DType("F64", 64, True),
    DType("I64", 64, False),
    DType("U64", 64, False),
)

DTYPES: Final[dict[str, DType]] = {dtype.name: dtype for dtype in _TABLE}

#: The dtypes that models are computed in, and the names users give them.
ARITHMETIC: Final[dict[str, str]] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

#: Rare and wide: what has it in any input is computed in float64. No output gets it that has not had it.
WIDE: Final = "F64"

#: Everything that can be computed with.
COMPUTABLE: Final = (*ARITHMETIC, WIDE)

#: From the names on the command line to the names in headers.
FROM_USER: Final[dict[str, str]] = {user: name for name, user in ARITHMETIC.items()}


def item_bytes(name: str) -> int:
    """Bytes an element of a dtype whose elements are whole bytes; KeyError for an unknown name."""
    return DTYPES[name].bits // 8
