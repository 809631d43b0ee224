"""Which token every id stands for, from a tokenizer's files. All of it is read, as hostile input.

Call `vocabulary_files` for what to read, then `parse_vocabulary` with what was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping
from typing import Any, Final, NamedTuple

#: The first of them that is there tells the vocabulary; the last one is sentencepiece's, or tiktoken's.
_MAIN: Final = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")
#: What a line of tiktoken's files is: bytes in base64, and their rank.
_RANK: Final = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")
#: Tokens that were added to all but the first.
_ADDED: Final = ("added_tokens.json", "tokenizer_config.json")


class VocabularyError(ValueError):
    """A file is not what its name says; ``file`` names it, the text says what is wrong."""

    def __init__(self, file: str, what: str) -> None:
        super().__init__(file, what)
        self.file, self.what = file, what


class Vocabulary(NamedTuple):
    """What a tokenizer's files tell."""

    tokens: Mapping[int, str]
    """The token of every id."""
    added: frozenset[int] = frozenset()
    """The ids of those that were added to a vocabulary, or are named again as added ones."""
    ranks: bytes = b""
    """Tiktoken's file, if that is what there is. Code elsewhere makes tokens of it: ``tokens`` has only those added."""

    @property
    def is_told(self) -> bool:
        """Whether the tokens are known."""
        return bool(self.tokens) and not self.ranks


def vocabulary_files(names: Container[str]) -> tuple[str, ...]:
    """Those of a checkpoint's files that tell its vocabulary; empty when none does."""
    main = next((name for name in _MAIN if name in names), None)
    if main is None:
        return ()
    return (main, *(name for name in _ADDED if name in names and main != _MAIN[0]))


def parse_vocabulary(files: Mapping[str, bytes]) -> Vocabulary:
    """The vocabulary, from the content of the `vocabulary_files`. Raises VocabularyError."""
    tokens, added, ranks = dict[int, str](), set[int](), b""
    for name, raw in files.items():
        if name == _MAIN[-1] and _is_tiktoken(raw):
            ranks = raw
            continue
        try:
            told = _PARSERS[name](raw)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise VocabularyError(name, f"does not tell the tokens of a tokenizer ({error!r:.100})") from None
        tokens.update(told.tokens)
        added.update(told.added)
    return Vocabulary(tokens, frozenset(added), ranks)


def _is_tiktoken(raw: bytes) -> bool:
    lines = list(filter(None, raw.splitlines()))
    return bool(lines) and all(map(_RANK.fullmatch, lines))


def _tokenizer_json(raw: bytes) -> Vocabulary:
    document = json.loads(raw)
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        tokens = {number: _text(entry[0]) for number, entry in enumerate(vocabulary)}
    else:
        tokens = _ids_by_token(vocabulary)
    added = {_id(token["id"]): _text(token["content"]) for token in document.get("added_tokens") or ()}
    return Vocabulary(tokens | added, frozenset(added))


def _ids_by_token(vocabulary: Mapping[Any, Any]) -> dict[int, str]:
    return {_id(number): _text(token) for token, number in vocabulary.items()}


def _vocab_json(raw: bytes) -> Vocabulary:
    return Vocabulary(_ids_by_token(json.loads(raw)))


def _added_tokens_json(raw: bytes) -> Vocabulary:
    added = _ids_by_token(json.loads(raw))
    return Vocabulary(added, frozenset(added))


def _lines(raw: bytes) -> Vocabulary:
    lines = raw.decode().split("\n")
    return Vocabulary(
        {number: line.rstrip("\r") for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines)}
    )


def _tokenizer_config(raw: bytes) -> Vocabulary:
    decoder = json.loads(raw).get("added_tokens_decoder") or {}
    added = {_id(int(number)): _text(token["content"]) for number, token in decoder.items()}
    return Vocabulary(added, frozenset(added))


def _sentencepiece(raw: bytes) -> Vocabulary:
    """The pieces are the messages in field 1 of the model, in the order of their ids; field 1 of a piece is its text
    (sentencepiece_model.proto)."""
    pieces = [value for field, value in _fields(memoryview(raw)) if field == 1]
    if not pieces:
        raise ValueError("it is no sentencepiece model")
    tokens = {}
    for number, piece in enumerate(pieces):
        tokens[number] = next(bytes(value).decode() for field, value in _fields(piece) if field == 1)
    return Vocabulary(tokens)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a protobuf message that are bytes, by their numbers; all others are passed over."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        match tag & 7:
            case 0:
                _, at = _varint(message, at)
            case 1:
                at += 8
            case 2:
                length, at = _varint(message, at)
                yield tag >> 3, message[at : at + length]
                at += length
            case 5:
                at += 4
            case kind:
                raise ValueError(f"a field has the wire type {kind}")
    if at != len(message):
        raise ValueError("the last field is cut off")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")


def _id(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.40} is no token's id")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no token")
    return value


_PARSERS: Final = {
    "tokenizer.json": _tokenizer_json,
    "vocab.json": _vocab_json,
    "vocab.txt": _lines,
    "tokenizer.model": _sentencepiece,
    "added_tokens.json": _added_tokens_json,
    "tokenizer_config.json": _tokenizer_config,
}
