"""Pickles read without running anything: every class that they may name becomes an `Inert` object, which only keeps
what it is given; every other name is refused.

Python's own unpickler does the reading, in its form that is written in Python, with the instructions that data needs
and no others: with few bytes, the compiled one can be made to fill the memory.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Final

_INSTRUCTIONS: Final = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.MEMOIZE, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPERSID),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
)


class PickleError(ValueError):
    """A pickle that is none, or that names what it may not name."""


class Inert:
    """Stands in for an object: the name of its class, what it was made from, and its state."""

    name: ClassVar[str]
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: object) -> Inert:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: object) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A field of what was a dataclass; None where it has none of that name."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def load_inert(raw: bytes, classes: Collection[str], values: Mapping[str, Any]) -> Any:
    """What a pickle holds, with `Inert` objects for ``classes`` and ``values`` for other names.

    All are named by ``module.name``; a value is a string, `tuple` or `Named`, which every dict in a pickle becomes.
    Tuples and lists may hold each other many times over: do not print, hash or compare them whole. Raises PickleError.
    """
    # New ones each time: a pickle might change them.
    known = {**{name: type(name, (Inert,), {"name": name}) for name in classes}, **values}
    try:
        return _Unpickler(io.BytesIO(raw), known).load()
    except PickleError:
        raise
    except Exception as error:  # whatever goes wrong in a hostile pickle
        raise PickleError(f"is not a pickle that can be read: {error!r:.200}") from None


class Named(dict[Any, Any]):
    """A dict without tuples for keys: to hash one that holds another one twice, and so on, would take time that doubles
    with every few bytes."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__()

    def __setitem__(self, key: object, value: object) -> None:
        if not isinstance(key, str | int | Inert):
            raise PickleError(f"has a key that is a {type(key).__name__}")
        super().__setitem__(key, value)


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS}
    dispatch[pickle.EMPTY_DICT[0]] = lambda self: self.append(Named())

    def __init__(self, file: io.BytesIO, known: Mapping[str, Any]) -> None:
        super().__init__(file)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[f"{module}.{name}"]
        except KeyError:
            raise PickleError(f"names {module}.{name}, which is no part of such a file") from None

    def persistent_load(self, found: Any) -> Any:
        return found
