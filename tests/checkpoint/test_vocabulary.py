"""The tokens in tokenizers' files, as tokenizers itself has them; and files that are not what their names say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rv_distributed.checkpoint.vocabulary import Vocabulary, VocabularyError, parse_vocabulary, vocabulary_files

TOKENS = ["<unk>", "a", "b", "Ġthe", "é", "the", "🙂"]
TOKENIZERS = ("BPE", "WordLevel", "WordPiece", "Unigram")


def made_by_tokenizers(kind: str, folder: Path) -> tuple[bytes, dict[int, str]]:
    """A tokenizer.json that the library has saved, with tokens added, and the library's own ids."""
    from tokenizers import Tokenizer, models

    ids = {token: number for number, token in enumerate(TOKENS)}
    if kind == "Unigram":
        arguments: tuple[Any, ...] = ([(token, -1.0) for token in TOKENS], 0, False)
    else:
        arguments = (ids, []) if kind == "BPE" else (ids,)
    tokenizer = Tokenizer(getattr(models, kind)(*arguments))
    tokenizer.add_special_tokens(["<pad>", "a"])
    tokenizer.save(str(folder / "tokenizer.json"))
    known = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    return (folder / "tokenizer.json").read_bytes(), known


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_every_kind_are_those_that_the_library_has(tmp_path: Path, kind: str) -> None:
    raw, known = made_by_tokenizers(kind, tmp_path)
    found = parse_vocabulary({"tokenizer.json": raw})
    assert (found.tokens, found.added) == (known, frozenset({1, 7}))
    assert known[7] == "<pad>"


def test_files_of_slow_tokenizers_are_put_together() -> None:
    files = {
        "vocab.json": json.dumps({"a": 0, "b": 1}).encode(),
        "added_tokens.json": json.dumps({"<x>": 2}).encode(),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"3": {"content": "<y>"}}}).encode(),
    }
    assert vocabulary_files(files) == tuple(files)
    assert parse_vocabulary(files) == Vocabulary({0: "a", 1: "b", 2: "<x>", 3: "<y>"}, frozenset({2, 3}))
    assert parse_vocabulary({"vocab.txt": b"a\r\n\nc d\n"}).tokens == {0: "a", 1: "", 2: "c d"}
    assert parse_vocabulary({"vocab.txt": b"a\nb"}).tokens == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer.model"), ("tokenizer.json",)),
        (("vocab.txt", "tokenizer_config.json"), ("vocab.txt", "tokenizer_config.json")),
        (("tokenizer.model", "vocab.json"), ("vocab.json",)),
        (("tokenizer_config.json", "merges.txt", "sub/vocab.json"), ()),
    ],
)
def test_the_first_file_that_tells_is_read(names: tuple[str, ...], read: tuple[str, ...]) -> None:
    assert vocabulary_files(names) == read


def sentencepiece_model(pieces: list[str]) -> bytes:
    """As protobuf writes it, with a score and a kind for every piece and fields of all sorts behind them."""
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

    model = sentencepiece.ModelProto()
    for number, piece in enumerate(pieces):
        model.pieces.add(piece=piece, score=-number / 7, type=2 if number == 0 else 1)
    model.trainer_spec.vocab_size = len(pieces)
    model.trainer_spec.model_prefix = "spiece"
    model.trainer_spec.character_coverage = 0.9995
    model.normalizer_spec.precompiled_charsmap = b"\xff" * 300
    raw: bytes = model.SerializeToString()
    return raw


@pytest.mark.parametrize("pieces", [TOKENS, ["▁the"] * 200, ["x" * 400, ""]])
def test_pieces_of_sentencepiece_are_read_as_protobuf_wrote_them(pieces: list[str]) -> None:
    assert parse_vocabulary({"tokenizer.model": sentencepiece_model(pieces)}).tokens == dict(enumerate(pieces))


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_of_sentencepiece_fail_otherwise(raw: bytes) -> None:
    try:
        tokens = parse_vocabulary({"tokenizer.model": raw}).tokens
    except VocabularyError as error:
        assert error.file == "tokenizer.model"  # noqa: PT017
    else:
        assert all(isinstance(token, str) for token in tokens.values())


@given(st.integers(0, 400))
def test_a_model_that_is_cut_short_is_refused_or_shorter(cut: int) -> None:
    raw = sentencepiece_model(TOKENS)
    try:
        found = parse_vocabulary({"tokenizer.model": raw[:cut]}).tokens
    except VocabularyError:
        return
    assert found == dict(enumerate(TOKENS[: len(found)]))


@pytest.mark.parametrize("raw", [b"IQ== 0\nIg== 1\n", b"IQ== 0\r\n\r\nICE= 1", b"abcd 12"])
def test_a_file_of_tiktoken_is_known_by_its_lines_and_tells_no_tokens(raw: bytes) -> None:
    found = parse_vocabulary({"tokenizer.model": raw, "added_tokens.json": b'{"<x>": 7}'})
    assert not found.is_told
    assert found == Vocabulary({7: "<x>"}, frozenset({7}), raw)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": -1}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": true}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "0"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": [[]]}}'),
        ("tokenizer.json", b'{"model": {"vocab": [[1, 2]]}}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}'),
        ("tokenizer.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1, "content": null}]}'),
        ("vocab.json", b"[]"),
        ("vocab.txt", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"IQ== 0\nIg== x\n"),
        ("tokenizer.model", b"\n"),
        ("tokenizer.model", b"\x0a\x04\x0a\x02\xff\xff"),
    ],
)
def test_files_that_tell_no_tokens_are_refused_by_name(name: str, raw: bytes) -> None:
    with pytest.raises(VocabularyError, match="does not tell the tokens") as caught:
        parse_vocabulary({name: raw})
    assert caught.value.file == name
