"""What every staging place notes: what is being made in it, and which pieces are finished. Text that says whether it
is whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from blake3 import blake3

from rv_distributed.errors import OutputError
from rv_distributed.identity import difference
from rv_distributed.measures import Measures
from rv_distributed.runtime.model import SpanResult


class Held(NamedTuple):
    """What a place says of the run that it is held for."""

    folder: str
    """Name of the folder that becomes the output; empty where there is none."""
    identity: Any
    manifest: str | None = None
    """Digest of the manifest, once the output is complete and about to be published."""
    ours: Sequence[str] = ()
    """In a store, the names of objects that are rv's to replace and to delete: those of the output that is being
    replaced, and whatever this run or an unfinished one before it makes there."""


class Record(NamedTuple):
    """A finished piece."""

    piece: int
    spans: tuple[SpanResult, ...]
    state: str
    """Of the object that the piece is; empty where it is a part of a file."""


def pack_held(held: Held) -> bytes:
    return json.dumps({"check": _check(json.dumps(held)), **held._asdict()}, indent=2).encode()


def unpack_held(raw: bytes, where: str) -> Held:
    """Raises OutputError when it is not what was written."""
    try:
        document = json.loads(raw)
        check, held = document.pop("check"), Held(**document)
        if check != _check(json.dumps(held)):
            raise ValueError("it has changed since it was written")
        return held
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OutputError(
            f"{where}: what an unfinished run was making cannot be read ({error!r}). "
            "Give --restart to throw its pieces away."
        ) from None


def pack_record(record: Record) -> str:
    """One line."""
    text = json.dumps(record)
    return f"{_check(text)} {text}"


def unpack_record(line: str) -> Record | None:
    """None when the line is not whole: a crash tore it while it was written."""
    check, _, text = line.rstrip("\n").partition(" ")
    if check != _check(text):
        return None
    piece, spans, state = json.loads(text)
    return Record(
        piece,
        tuple(
            SpanResult(tensor, digest, Measures._make([*numbers, tuple(ulps)]), scales)
            for tensor, digest, (*numbers, ulps), scales in spans
        ),
        state,
    )


def check_same(out: str, held: Held, identity: Any) -> None:
    """Raise OutputError, naming the difference, when an unfinished run at ``out`` was another."""
    if held.identity != json.loads(json.dumps(identity)):
        raise OutputError(
            f"{out}: an unfinished run was begun with other inputs, options or versions "
            f"({difference(held.identity, identity, 'the small files of an input')}). "
            "Run that command again to finish it, or give --restart to throw its pieces away."
        )


def _check(text: str) -> str:
    return blake3(text.encode()).hexdigest(16)
