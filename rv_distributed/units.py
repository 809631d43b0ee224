"""Numbers as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rv_distributed.errors import UsageError

_FACTORS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def parse_bytes(text: str, option: str) -> int:
    """``5GB``, ``512MiB`` or ``1000000`` as bytes; UsageError naming ``option`` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", text.upper())
    if not found or (found[3] and not found[2]):
        raise UsageError(f"{option}: {text!r} is not a size; write for instance 5GB or 512MiB")
    factor = _BINARY[found[2]] if found[3] else _FACTORS[found[2]]
    return int(float(found[1]) * factor)


def show_bytes(count: float) -> str:
    """Bytes in decimal units with three digits."""
    return _scaled(round(count), (" B", " kB", " MB", " GB", " TB", " PB", " EB"), digits=3)


def show_count(count: float) -> str:
    """A number of things, such as parameters: ``494 M``."""
    return _scaled(count, ("", " k", " M", " B", " T"), digits=4)


def _scaled(count: float, units: Sequence[str], *, digits: int) -> str:
    """``count`` in the first of ``units``, each 1000 of the one before, in which it is less than 1000 as shown."""
    for unit in units[:-1]:
        if float(shown := f"{count:.{digits}g}") < 1000:
            return shown + unit
        count /= 1000
    return f"{count:.{digits}g}{units[-1]}"


def show_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plural(count: int, thing: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"
