"""Pairs on a Ray cluster: one task of Ray each, with a GPU to itself where the cluster has some."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

import ray
from ray.exceptions import RayError, RayTaskError

from rv_distributed.evaluation.local import failed
from rv_distributed.evaluation.model import CONSENT_VARIABLE, Answers, Ask, Failed, Means, Pair, Results, Variant
from rv_distributed.runtime.on_ray import RayRuntime
from rv_distributed.runtime.on_ray.pool import brief, wait
from rv_distributed.runtime.select import RunOptions

#: How often Ray starts a task again whose process or node was lost.
_RETRIES: Final = 2
#: Longest call of ray.wait: what a signal handler raises comes out only at its end.
_WAIT_S: Final = 1.0


def run_on_ray(pairs: Sequence[Pair], means: Means, options: RunOptions) -> Results:
    """The answers to each pair, or why there are none, in the order in which they come.

    Raises UsageError when the cluster cannot be reached or lacks what is asked for.
    """
    # The harness asks the process that runs code, and that is another one now.
    consent = os.environ.get(CONSENT_VARIABLE)
    with RayRuntime(options, pieces=len(pairs)) as runtime:
        task = ray.remote(_answer).options(max_retries=_RETRIES, **runtime.placement())
        # With its plan a variant of a large model is megabytes, and goes to a node once.
        variants = {pair.variant.identity: ray.put(pair.variant) for pair in pairs}
        calls: dict[Any, Pair] = {}
        left = iter(pairs)

        def start(count: int) -> None:
            for pair in islice(left, count):
                call = task.remote(variants[pair.variant.identity], pair.ask, pair.identity, means, consent)
                calls[call] = pair

        try:
            start(options.workers or len(pairs))
            while calls:
                for call in wait(list(calls), _WAIT_S):
                    start(1)
                    yield calls[call], _result(call, calls.pop(call))
        finally:
            for call in calls:
                ray.cancel(call, force=True)


def _answer(variant: Variant, ask: Ask, identity: str, means: Means, consent: str | None) -> Answers | Failed:
    """Answer a pair in a process of Ray's. What goes wrong comes back as a value: Ray would print it, too."""
    from rv_distributed.evaluation.harness import Harness

    if consent is not None:
        os.environ[CONSENT_VARIABLE] = consent
    pair = Pair(variant, ask, identity)
    try:
        return Harness(means).answer(pair)
    except Exception as error:
        return failed(pair, error)


def _result(call: Any, pair: Pair) -> Answers | Failed:
    try:
        found: Answers | Failed = ray.get(call)
    except RayTaskError as error:
        return Failed(pair.label, f"a worker failed: {error.cause!r}")
    except RayError as error:
        return Failed(pair.label, brief(error))
    return found
