"""The command line ``rv``: a thin layer over the library. `main` is the console script."""

from __future__ import annotations

from rv_distributed.cli.app import main

__all__ = ["main"]
