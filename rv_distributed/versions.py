"""The versions of what outputs depend on."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Final

_DECIDING: Final = ("rv-distributed", "torch", "numba", "llvmlite", "numpy", "safetensors", "pyarrow", "blake3")
_OTHERS: Final = ("ray", "huggingface_hub", "pydantic", "PyYAML", "typer", "rich", "plotly")


def versions() -> dict[str, str]:
    """The versions that an output's bytes may depend on."""
    return {"python": platform.python_version(), **_installed(_DECIDING)}


def all_versions() -> dict[str, str]:
    """The same, the other packages that are used, and the system."""
    return {**versions(), **_installed(_OTHERS), "system": platform.platform()}


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}
