"""Pairs one after the other in this process. Those of one model come together, so that each is loaded once."""

from __future__ import annotations

from collections.abc import Sequence

from rv_distributed.errors import Interrupted, one_line
from rv_distributed.evaluation.model import Failed, Means, Pair, Results


def run_here(pairs: Sequence[Pair], means: Means) -> Results:
    """The answers to each pair, or why there are none."""
    from rv_distributed.evaluation.harness import Harness

    harness = Harness(means)
    for pair in pairs:
        try:
            yield pair, harness.answer(pair)
        except Interrupted:
            raise
        except Exception as error:
            yield pair, failed(pair, error)


def failed(pair: Pair, error: Exception) -> Failed:
    """Why a pair has no answers: whatever the harness, the model or the storage raised is that pair's own matter."""
    return Failed(pair.label, one_line(f"{type(error).__name__}: {error}"))
