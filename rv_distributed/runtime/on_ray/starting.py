"""A Ray of our own that is up soon.

Around the two servers that do the work, ray.init starts three Python processes and waits for some of them: the
dashboard's, which is started even where there is no dashboard, the autoscaler's and the log monitor's. A run on one
machine asks nothing of them, and each imports ray for half a second of a processor. With the extra ``ray[default]``,
each node's agent imports half of a web server as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import ray

#: Methods of Ray's that start one process each. They are not public: one that a version of Ray has under another name
#: starts its process, as ever.
_SPARED: Final = ("start_api_server", "start_log_monitor", "start_monitor")
#: What Ray tries to import to learn whether it is installed with the extra.
_EXTRA: Final = "ray.dashboard.optional_deps"


@contextmanager
def few_processes() -> Iterator[None]:
    """While this is entered, ray.init starts no more than a run needs, as if Ray was installed without extras."""
    node = ray._private.node.Node
    spared = {name: method for name in _SPARED if (method := vars(node).get(name)) is not None}
    extra = {_EXTRA: sys.modules[_EXTRA]} if _EXTRA in sys.modules else {}
    for name in spared:
        setattr(node, name, _start_nothing)
    sys.modules[_EXTRA] = None  # type: ignore[assignment]  # the import system's way to say that there is none
    try:
        yield
    finally:
        for name, method in spared.items():
            setattr(node, name, method)
        del sys.modules[_EXTRA]
        sys.modules.update(extra)


def _start_nothing(*_: object, **__: object) -> None:
    pass
