"""Numbers as people write and read them."""

from __future__ import annotations

import re

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
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def show_count(count: float) -> str:
    """A number of things, such as parameters: ``494 M``."""
    for unit in ("", " k", " M", " B"):
        if count < 1000:
            return f"{count:.4g}{unit}"
        count /= 1000
    return f"{count:.4g} T"


def show_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def plural(count: int, thing: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"
