"""The command line ``rv``: a thin layer over the library. `main` is the console script."""

from __future__ import annotations

import signal

__all__ = ["main"]


def main() -> None:
    """Run ``rv`` with the process's arguments, and exit with its status."""
    # While the rest is imported there is nothing to stop in order; Python's own handler would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rv_distributed.cli.app import main as run

    run()
