"""A Ray of our own that is up soon.

Around the two servers that do the work, ray.init starts three Python processes and waits for some of them: the
dashboard's, which is started even where there is no dashboard, the autoscaler's and the log monitor's. A run on one
machine asks nothing of them, and each imports ray for half a second of a processor. With the extra ``ray[default]``,
each node's agent imports half of a web server as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import ray

#: Methods of Ray's that start one process each. They are not public: what a version of Ray has under other names is
#: started as ever.
_SPARED: Final = ("start_api_server", "start_log_monitor", "start_monitor")
#: What Ray tries to import to learn whether it is installed with the extra.
_EXTRA: Final = "ray.dashboard.optional_deps"
#: Its reports on tasks, which only a dashboard shows, and the last of which ray.shutdown would await for 0.25 s.
_NO_REPORTS: Final = ("RAY_task_events_report_interval_ms", "0")


@contextmanager
def quick_start() -> Iterator[None]:
    """While this is entered, ray.init starts no more than a run needs, as if Ray was installed without extras."""
    node = getattr(getattr(getattr(ray, "_private", None), "node", None), "Node", object)
    with ExitStack() as stack:
        for name in _SPARED:
            if name in vars(node):
                stack.callback(setattr, node, name, vars(node)[name])
                setattr(node, name, _start_nothing)
        # None is the import system's way to say that there is no such module.
        stack.enter_context(_replaced(sys.modules, _EXTRA, None))
        name, value = _NO_REPORTS
        stack.enter_context(_replaced(os.environ, name, os.environ.get(name, value)))
        yield


@contextmanager
def _replaced(mapping: MutableMapping[str, Any], key: str, value: object) -> Iterator[None]:
    before = {key: mapping[key]} if key in mapping else {}
    mapping[key] = value
    try:
        yield
    finally:
        del mapping[key]
        mapping.update(before)


def _start_nothing(*_: object, **__: object) -> None:
    pass
