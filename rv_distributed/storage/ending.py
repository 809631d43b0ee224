"""Ending although a storage hangs: nothing ends a thread that waits for one, so after a while it is left alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

#: How long a storage is waited for by what ends, in seconds: longer than one that works needs.
END_S: Final = 10.0


def briefly(do: Callable[[], object]) -> None:
    """Call ``do``, and return `END_S` later at the latest, whatever it is still at. Raises what it raises by then."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            do()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="rv-ending", daemon=True)
    thread.start()
    thread.join(END_S)
    if raised:
        raise raised.pop()


@contextmanager
def ending_briefly() -> Iterator[ExitStack]:
    """A stack of contexts that after an error are not waited for any longer than `briefly` does.

    What they hold, as a lease, is then held until the storage answers or the process ends.
    """
    with ExitStack() as stack:
        try:
            yield stack
        except BaseException as error:
            briefly(partial(stack.pop_all().__exit__, type(error), error, error.__traceback__))
            raise
