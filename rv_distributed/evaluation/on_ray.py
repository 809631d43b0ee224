"""Pairs on a Ray cluster: one task of Ray each, with a GPU to itself where the cluster has some."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError

from rv_distributed.evaluation.local import failed
from rv_distributed.evaluation.model import CONSENT_VARIABLE, Answers, Ask, Failed, Means, Pair, Results, Variant
from rv_distributed.runtime.on_ray import RayRuntime
from rv_distributed.runtime.on_ray.pool import START_S, brief, wait, without_place
from rv_distributed.runtime.select import RunOptions

#: How often a pair is tried again whose process or node was lost.
_RETRIES: Final = 2
#: Longest call of ray.wait: what a signal handler raises comes out only at its end.
_WAIT_S: Final = 1.0


class _Call(NamedTuple):
    """A running task of Ray."""

    pair: Pair
    attempt: int = 1
    has_place: bool = False
    """Whether it has begun, and so does not wait for resources."""


def run_on_ray(pairs: Sequence[Pair], means: Means, options: RunOptions) -> Results:
    """The answers to each pair, or why there are none, in the order in which they come.

    Raises UsageError when the cluster cannot be reached or lacks what is asked for, and WorkerError when it has had no
    place for any pair for a quarter of an hour.
    """
    # The harness asks the process that runs code, and that is another one now.
    consent = os.environ.get(CONSENT_VARIABLE)
    with RayRuntime(options, pieces=len(pairs)) as runtime:
        placement = runtime.placement()
        # Ray's own retries would hide that a task waits for resources again.
        task = ray.remote(_answer).options(max_retries=0, num_returns="streaming", **placement)
        # With its plan a variant of a large model is megabytes, and goes to a node once.
        variants = {pair.variant.identity: ray.put(pair.variant) for pair in pairs}
        calls: dict[Any, _Call] = {}

        def start(call: _Call) -> None:
            pair = call.pair
            calls[task.remote(variants[pair.variant.identity], pair.ask, pair.identity, means, consent)] = call

        left = map(_Call, pairs)
        placed = time.monotonic()
        try:
            for call in islice(left, options.workers or len(pairs)):
                start(call)
            while calls:
                for stream in wait(list(calls), _WAIT_S):
                    call = calls.pop(stream)
                    found = _next(stream, call)
                    if found is None:
                        calls[stream] = call._replace(has_place=True)
                    elif isinstance(found, _Call):
                        start(found)
                    else:
                        for following in islice(left, 1):
                            start(following)
                        yield call.pair, found
                if any(call.has_place for call in calls.values()):
                    placed = time.monotonic()
                elif calls and time.monotonic() - placed > START_S:
                    raise without_place(placement, START_S)
        finally:
            for stream in calls:
                ray.cancel(stream, force=True)


def _answer(
    variant: Variant, ask: Ask, identity: str, means: Means, consent: str | None
) -> Iterator[Answers | Failed | None]:
    """Answer a pair in a process of Ray's, after a None when it begins. What goes wrong comes back as a value: Ray
    would print it, too."""
    yield None
    from rv_distributed.evaluation.harness import Harness

    if consent is not None:
        os.environ[CONSENT_VARIABLE] = consent
    pair = Pair(variant, ask, identity)
    try:
        found: Answers | Failed = Harness(means).answer(pair)
    except Exception as error:
        found = failed(pair, error)
    yield found


def _next(stream: Any, call: _Call) -> Answers | Failed | _Call | None:
    """What a task has yielded or, where its process or node was lost, the call to make in its place."""
    try:
        found: Answers | Failed | None = ray.get(next(stream))
    except RayTaskError as error:
        return Failed(call.pair.label, f"a worker failed: {error.cause!r}")
    except RayError as error:
        if call.attempt <= _RETRIES:
            return _Call(call.pair, call.attempt + 1)
        return Failed(call.pair.label, brief(error))
    return found
