"""The one place where the command line prints: what it says quotes names and texts from files, which are escaped
here before a terminal can obey them, and the secrets of URIs are taken out."""

from __future__ import annotations

import sys

from rv_distributed.errors import printable


def say(text: str) -> None:
    """Print on stdout."""
    print(printable(text), flush=True)


def warn(text: str) -> None:
    """Print on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def hide_upload_bars() -> None:
    """Keep huggingface_hub's progress bars off stderr."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()
