"""Pairs on a Ray cluster: one task of Ray each, with a GPU to itself where the cluster has some."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final

import ray
from ray.exceptions import RayError

from rv_distributed.errors import RvError
from rv_distributed.evaluation.local import failed
from rv_distributed.evaluation.model import Answers, Failed, Means, Pair
from rv_distributed.runtime.on_ray import RayRuntime
from rv_distributed.runtime.select import RunOptions

#: How often Ray starts a task again whose process or node was lost.
_RETRIES: Final = 2
#: Longest call of ray.wait: what a signal handler raises comes out only at its end.
_WAIT_S: Final = 1.0


def run_on_ray(pairs: Sequence[Pair], means: Means, options: RunOptions) -> Iterator[tuple[Pair, Answers | Failed]]:
    """The answers to each pair, or why there are none, in the order in which they come.

    Raises UsageError when the cluster cannot be reached or lacks what is asked for.
    """
    with RayRuntime(options, pieces=len(pairs), buffer_bytes=0) as runtime:
        wanted: dict[str, Any] = {"num_gpus": 1} if runtime.uses_gpus else {"num_cpus": options.cpus_per_worker}
        task = ray.remote(_answer).options(max_retries=_RETRIES, scheduling_strategy="SPREAD", **wanted)
        variants = {pair.variant: ray.put(pair.variant) for pair in pairs}
        calls = {task.remote(pair._replace(...), means): pair for pair in pairs}
