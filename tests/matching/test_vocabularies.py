"""Embeddings and heads of other sizes: the rows that all have get the vector, if the tokenizers mean the same."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Raw, assert_same, combined, read_checkpoint, weights
from refusal import ROLES, assert_refused, run_rv, transfer
from triples import ALPHA, applied, ok, rows_of, transferred, write_models

import rv_distributed as rv

WIDTH = 300
#: Large enough that the last shared row lies within a block, and the embedding in several pieces of 1 MiB.
ROWS = {"target": 1900, "donor": 2048, "reference": 1901}
Words = list[str]


def words(count: int) -> Words:
    return [f"w{number}" for number in range(count)]


def tokenizer_json(tokens: Words, added: Mapping[int, str] | None = None) -> dict[str, bytes]:
    document = {
        "model": {"type": "BPE", "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []},
        "added_tokens": [{"id": number, "content": token} for number, token in (added or {}).items()],
    }
    return {"tokenizer.json": json.dumps(document).encode()}


def models_of(
    folder: Path,
    rows: Mapping[str, int] = ROWS,
    *,
    tokenizers: Mapping[str, Mapping[str, bytes]] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """Models with an embedding and a head of as many rows as ``rows`` says, and a tensor beside them."""
    rng = np.random.default_rng(5)
    dtypes = dict.fromkeys(ROLES, "BF16") | dict(dtypes or {})
    tensors = {
        role: {
            "model.embed_tokens.weight": weights(rng, dtypes[role], (rows[role], WIDTH)),
            "model.norm.weight": weights(rng, dtypes[role], (WIDTH,)),
            "lm_head.weight": weights(rng, dtypes[role], (rows[role], WIDTH)),
        }
        for role in ROLES
    }
    configs = {role: {"vocab_size": rows[role]} for role in ROLES}
    sidecars = tokenizers or {role: tokenizer_json(words(1800)) for role in ROLES}
    return write_models(folder, tensors, configs=configs, sidecars=sidecars)


def wanted(models: Path, shared: int) -> dict[str, Raw]:
    """The target's tensors, with the vector in the first ``shared`` rows of those that have more."""
    t, a, b = (read_checkpoint(models / role) for role in ROLES)
    made = {}
    for name, raw in t.items():
        first = [first_rows(each[name], shared) for each in (t, a, b)]
        sums = combined(first[0], [(first[1], first[2])], [ALPHA])
        made[name] = Raw(raw.dtype, raw.shape, sums.data + raw.data[len(sums.data) :])
    return made


def first_rows(raw: Raw, count: int) -> Raw:
    if len(raw.shape) == 1:
        return raw
    row = len(raw.data) // raw.shape[0]
    return Raw(raw.dtype, (count, *raw.shape[1:]), raw.data[: count * row])


def test_the_shared_rows_get_the_vector_and_the_others_stay(tmp_path: Path) -> None:
    models = models_of(tmp_path, dtypes={"donor": "F32", "reference": "F16"})
    found, said = transferred(models, "--vocab-mismatch", "overlap", "--max-shard-size", "3MB")
    assert_same(found, wanted(models, 1900))
    assert "the first 1900 of 2048 rows" in said
    assert "the tokenizers have the same tokens there" in said
    rows = rows_of(models / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert rows[name].matched == "donor: the first 1900 of 2048 rows; reference: the first 1900 of 1901 rows"
    assert rows["model.norm.weight"].matched == ""


@pytest.mark.parametrize("smallest", ROLES)
def test_whoever_has_the_fewest_rows_says_how_many_are_shared(tmp_path: Path, smallest: str) -> None:
    models = models_of(tmp_path, {role: 1900 if role == smallest else 2048 for role in ROLES})
    found, _ = transferred(models, "--vocab-mismatch", "overlap")
    assert_same(found, wanted(models, 1900))
    assert_same(applied(models, "--vocab-mismatch", "overlap"), found)


def test_a_vector_has_the_donor_s_rows_with_zeros_where_the_reference_has_none(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    applied(models, "--vocab-mismatch", "overlap")
    vector = read_checkpoint(models / "vector")["model.embed_tokens.weight"]
    assert vector.shape == (2048, WIDTH)
    values = np.frombuffer(vector.data, np.float32).reshape(vector.shape)
    assert values[:1901].any(axis=1).all()
    assert not values[1901:].any()
    assert json.loads((models / "vector" / "config.json").read_bytes())["vocab_size"] == 2048


def test_measures_are_those_of_the_rows_that_got_the_vector(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    transferred(models, "--vocab-mismatch", "overlap")
    row = rows_of(models / "out")["model.embed_tokens.weight"]
    t, a, b = (first_rows(read_checkpoint(models / role)[row.name], 1900) for role in ROLES)
    wide = [np.frombuffer(raw.data, np.uint16).astype(np.uint32) << 16 for raw in (t, a, b)]
    values = [each.view(np.float32).astype(np.float64) for each in wide]
    assert row.t_norm == pytest.approx(np.linalg.norm(values[0]), rel=1e-12)
    assert row.v_norm == pytest.approx(np.linalg.norm(values[1] - values[2]), rel=1e-6)
    assert row.nonzero == np.count_nonzero(values[1] != values[2])


def test_measures_do_not_depend_on_the_pieces(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    inputs = [str(models / role) for role in ROLES]
    tables = []
    for piece_bytes in (1 << 20, 4 << 20, 64 << 20):
        options = rv.PlanOptions(piece_bytes=piece_bytes, vocab_mismatch="overlap")
        out = models / f"out-{piece_bytes}"
        rv.transfer(
            inputs[0],
            inputs[1],
            inputs[2],
            str(out),
            alpha=ALPHA,
            plan_options=options,
            run_options=rv.RunOptions(runtime="local"),
        )
        parts = [len(row.parts) for row in rows_of(out).values()]
        assert parts == ([2, 1, 2] if piece_bytes == 1 << 20 else [1, 1, 1])
        tables.append([row._replace(digest="", parts=()) for row in rows_of(out).values()])
    assert tables[0] == tables[1] == tables[2]


def test_the_default_is_an_error_that_names_the_sizes_and_the_option(tmp_path: Path) -> None:
    models = models_of(tmp_path, {"target": 1900, "donor": 1900, "reference": 1901})
    shape = f"{models / 'reference'}: tensor 'lm_head.weight': has shape [1901, 300], but [1900, 300] in the target"
    config = f"{models / 'reference' / 'config.json'}: has vocab_size 1901, but {models / 'target' / 'config.json'} has"
    option = "Give --vocab-mismatch overlap"
    assert_refused(models, transfer(models, models / "out"), (shape, option), (config, "1900", option))


def test_rows_that_the_config_does_not_tell_are_no_vocabulary(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    for role in ROLES:
        (models / role / "config.json").write_text('{"model_type": "llama"}')
    told = "has shape [2048, 300], but [1900, 300] in the target. Check that the inputs are the same model"
    assert_refused(models, transfer(models, models / "out", "--vocab-mismatch", "overlap"), told)


def test_tokenizers_that_differ_in_a_shared_id_are_refused_naming_it(tmp_path: Path) -> None:
    other = words(1800)
    other[1234] = "\x1b[31mevil"
    tokenizers = {role: tokenizer_json(words(1800)) for role in ROLES} | {"donor": tokenizer_json(other)}
    models = models_of(tmp_path, tokenizers=tokenizers)
    told = f"{models / 'donor'}: has other tokens than {models / 'target'} for 1 of 1900 ids: 1234 is "
    args = transfer(models, models / "out", "--vocab-mismatch", "overlap")
    done = assert_refused(models, args, (told, "and 'w1234' there", "--force-tokenizer-mismatch"))
    assert "\x1b" not in done.stderr
    found, said = transferred(models, "--vocab-mismatch", "overlap", "--force-tokenizer-mismatch")
    assert_same(found, wanted(models, 1900))
    assert "tokenizers were not compared" in said
    manifest = json.loads((models / "out" / "rv_manifest.json").read_bytes())
    assert manifest["options"]["force_tokenizer_mismatch"] == "true"
    assert {"rule": "vocabulary", "what": "tokenizers were not compared; other rows stay as they are"} in manifest[
        "rules"
    ]


def test_a_token_that_one_of_them_added_differs_only_where_both_have_its_row(tmp_path: Path) -> None:
    """32000 and 32001 rows, with <pad> as the last one; and <pad> where the other has a row, but no token."""
    rows = {"target": 1800, "donor": 1801, "reference": 1801}
    tokenizers = {role: tokenizer_json(words(1800), {1800: "<pad>"} if role != "target" else None) for role in ROLES}
    found, _ = transferred(models_of(tmp_path / "new", rows, tokenizers=tokenizers), "--vocab-mismatch", "overlap")
    assert_same(found, wanted(tmp_path / "new", 1800))
    models = models_of(tmp_path / "padded", rows | {"target": 1900}, tokenizers=tokenizers)
    told = "for 1 of 1801 ids: 1800 is '<pad>' here and no token there"
    assert_refused(models, transfer(models, models / "out", "--vocab-mismatch", "overlap"), told)


def test_an_input_without_a_tokenizer_cannot_be_compared(tmp_path: Path) -> None:
    tokenizers = {role: tokenizer_json(words(1800)) for role in ROLES} | {"reference": {"qwen.tiktoken": b"IQ== 0\n"}}
    models = models_of(tmp_path, tokenizers=tokenizers)
    told = f"{models / 'reference'}: has no tokenizer.json, vocab.json, vocab.txt or sentencepiece's tokenizer.model"
    args = transfer(models, models / "out", "--vocab-mismatch", "overlap")
    assert_refused(models, args, (told, "--force-tokenizer-mismatch"))


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tokenizers = {role: tokenizer_json(words(1800)) for role in ROLES} | {"donor": {"tokenizer.json": b'{"model": []}'}}
    models = models_of(tmp_path, tokenizers=tokenizers)
    told = f"{models / 'donor' / 'tokenizer.json'}: does not tell the tokens of a tokenizer"
    assert_refused(models, transfer(models, models / "out", "--vocab-mismatch", "overlap"), told)
    assert run_rv(*transfer(models, models / "out", "--exclude", "embed|head")).status == 0


EQUAL = dict.fromkeys(ROLES, 1900)


@pytest.mark.parametrize("more", [(), ("--vocab-mismatch", "overlap")])
def test_other_tokens_in_vocabularies_of_one_size_are_refused(tmp_path: Path, more: tuple[str, ...]) -> None:
    others = tokenizer_json([f"v{number}" for number in range(1800)])
    tokenizers = {"target": tokenizer_json(words(1800)), "donor": others, "reference": others}
    models = models_of(tmp_path, EQUAL, tokenizers=tokenizers)
    remedies = "leave embedding and head out with --exclude; or give --force-tokenizer-mismatch"
    told = f"has other tokens than {models / 'target'} for 1800 of 1900 ids: 0 is 'v0' here and 'w0' there. "
    wanted_of = {role: (f"{models / role}: {told}", remedies) for role in ("donor", "reference", "vector")}
    args = transfer(models, models / "out", *more)
    done = assert_refused(models, args, wanted_of["donor"], wanted_of["reference"])
    assert done.stderr.startswith("rv: 2 problems")
    ok("extract", "--donor", models / "donor", "--reference", models / "reference", "--out", models / "vector")
    args = ["apply", "--target", models / "target", "--vector", models / "vector", "--out", models / "out", *more]
    assert_refused(models, args, wanted_of["vector"])


@pytest.mark.parametrize("rows", [EQUAL, ROWS], ids=["equal", "overlap"])
def test_added_tokens_that_were_renamed_are_warned_of(tmp_path: Path, rows: dict[str, int]) -> None:
    """As reserved tokens of Llama are, or DeepSeek's in a distilled Qwen."""
    reserved = {number: f"<reserved_{number}>" for number in range(1700, 1900)}
    renamed = reserved | {1700: "<|im_start|>", 1701: "\x1b[31m", 1702: "<a>", 1800: "<b>"}
    slow = {
        "vocab.json": json.dumps({token: number for number, token in enumerate(words(1700))}).encode(),
        "added_tokens.json": json.dumps(
            {token: number for number, token in reserved.items() if number > 1700}
        ).encode(),
        "tokenizer_config.json": b'{"added_tokens_decoder": {"1700": {"content": "<reserved_1700>"}}}',
    }
    tokenizers = {"target": slow, "donor": tokenizer_json(words(1700), renamed), "reference": slow}
    models = models_of(tmp_path, rows, tokenizers=tokenizers)
    more = () if rows == EQUAL else ("--vocab-mismatch", "overlap")
    found, said = transferred(models, *more)
    assert_same(found, wanted(models, 1900))
    assert "the tokenizers differ in added tokens only" in said
    args = transfer(models, models / "dry", "--dry-run", "--json", *more)
    done = ok(*args)
    (told,) = json.loads(done.stdout)["plan"]["warnings"]
    assert told == (
        f"{models / 'donor'}: has other added tokens than {models / 'target'} for 4 of 1900 ids: "
        "1700 is '<|im_start|>' here and '<reserved_1700>' there; 1701 is '\\x1b[31m' here and '<reserved_1701>' "
        "there; 1702 is '<a>' here and '<reserved_1702>' there: these rows are added all the same"
    )
    assert "warning: " in done.stderr
    assert "warning" not in ok(*args, "--force-tokenizer-mismatch").stderr


@pytest.mark.parametrize("added", [{0: "<a>", 1800: "<b>"}, {1800: "<b>"}])
def test_a_token_that_only_one_calls_added_is_an_ordinary_one(tmp_path: Path, added: dict[int, str]) -> None:
    """And one of them is enough: the first of them is named."""
    own = tokenizer_json(words(1800), {1800: "<c>"})
    there = tokenizer_json(words(1800) if 0 in added else ["v0", *words(1800)[1:]], added)
    models = models_of(tmp_path, EQUAL, tokenizers={"target": own, "donor": there, "reference": own})
    told = f"{models / 'donor'}: has other tokens than {models / 'target'} for 2 of 1900 ids: 0 is "
    assert_refused(models, transfer(models, models / "out"), told)


def test_other_tokens_are_added_to_if_forced_and_no_matter_where_no_row_is(tmp_path: Path) -> None:
    others = tokenizer_json([f"v{number}" for number in range(1800)])
    tokenizers = {"target": tokenizer_json(words(1800)), "donor": others, "reference": others}
    models = models_of(tmp_path, EQUAL, tokenizers=tokenizers)
    found, said = transferred(models, "--force-tokenizer-mismatch")
    assert_same(found, wanted(models, 1900))
    assert "tokenizers were not compared" in said
    args = transfer(models, models / "left", "--exclude", "embed")
    assert_refused(models, args, "for 1800 of 1900 ids")
    assert "tokenizers" not in ok(*transfer(models, models / "left", "--exclude", "embed|head")).stdout


def test_vocabularies_of_one_size_may_lack_tokens_and_tokenizers(tmp_path: Path) -> None:
    """A row that only one has a token for is of no use to the other; without a tokenizer, sizes are all there is."""
    added = tokenizer_json(words(1800), {1800: "<think>"})
    tokenizers = {"target": tokenizer_json(words(1799)), "donor": added, "reference": {"qwen.tiktoken": b"IQ== 0\n"}}
    models = models_of(tmp_path, EQUAL, tokenizers=tokenizers)
    assert_same(transferred(models)[0], wanted(models, 1900))


def tiktoken(tokens: int, chat_template: str, added: str = "<think>") -> dict[str, bytes]:
    """As GLM-4 has it."""
    config = {"added_tokens_decoder": {str(tokens): {"content": added}}, "chat_template": chat_template}
    ranks = b"".join(base64.b64encode(b"t%d" % number) + b" %d\n" % number for number in range(tokens))
    return {"tokenizer.model": ranks, "tokenizer_config.json": json.dumps(config).encode()}


def test_files_of_tiktoken_tell_no_tokens(tmp_path: Path) -> None:
    tokenizers = {"target": tiktoken(1700, "a"), "donor": tiktoken(1800, "b"), "reference": tokenizer_json(words(9))}
    models = models_of(tmp_path, EQUAL, tokenizers=tokenizers)
    assert_same(transferred(models)[0], wanted(models, 1900))
    models = models_of(tmp_path / "overlap", tokenizers=tokenizers)
    told = [f"{models / role}: has no tokenizer.json, vocab.json, vocab.txt or sent" for role in ("target", "donor")]
    assert_refused(models, transfer(models, models / "out", "--vocab-mismatch", "overlap"), *told)


def test_files_of_tiktoken_that_are_the_same_but_for_chat_templates_have_the_same_tokens(tmp_path: Path) -> None:
    tokenizers = {role: tiktoken(1800, f"template of the {role}") for role in ROLES}
    models = models_of(tmp_path, tokenizers=tokenizers)
    assert_same(transferred(models, "--vocab-mismatch", "overlap")[0], wanted(models, 1900))
    config = tiktoken(1800, "", "<tool>")["tokenizer_config.json"]
    (models / "donor" / "tokenizer_config.json").write_bytes(config)
    told = f"{models / 'donor'}: has no tokenizer.json"
    assert_refused(models, transfer(models, models / "left", "--vocab-mismatch", "overlap"), told)


def test_tokenizers_of_the_same_bytes_are_not_parsed(tmp_path: Path) -> None:
    models = models_of(tmp_path, EQUAL, tokenizers={role: {"tokenizer.json": b"none"} for role in ROLES})
    assert_same(transferred(models)[0], wanted(models, 1900))


def test_where_no_config_tells_the_rows_names_do(tmp_path: Path) -> None:
    tokenizers = {role: tokenizer_json(words(1800)) for role in ROLES} | {"donor": tokenizer_json(words(1800)[::-1])}
    models = models_of(tmp_path, EQUAL, tokenizers=tokenizers)
    for role in ROLES:
        (models / role / "config.json").write_text('{"model_type": "llama"}')
    told = f"{models / 'donor'}: has other tokens than {models / 'target'} for 1800 of 1800 ids"
    assert_refused(models, transfer(models, models / "out"), told)


def test_outputs_are_verified_whatever_the_tokenizers_are_now(tmp_path: Path) -> None:
    models = models_of(tmp_path, EQUAL)
    transferred(models)
    (models / "donor" / "tokenizer.json").write_bytes(tokenizer_json(words(1800)[::-1])["tokenizer.json"])
    ok("verify", models / "out", "--against-inputs")


def test_fast_and_slow_files_of_one_tokenizer_agree(tmp_path: Path) -> None:
    slow: dict[str, Any] = {"vocab.json": {token: number for number, token in enumerate(words(1799))}}
    slow["added_tokens.json"] = {"w1799": 1799}
    tokenizers = {
        "target": tokenizer_json(words(1800)),
        "donor": {name: json.dumps(content).encode() for name, content in slow.items()},
        "reference": {"vocab.txt": "".join(f"{token}\n" for token in words(1800)).encode()},
    }
    models = models_of(tmp_path, tokenizers=tokenizers)
    found, _ = transferred(models, "--vocab-mismatch", "overlap")
    assert_same(found, wanted(models, 1900))


def test_a_sweep_leaves_the_other_rows_alone_in_every_output(tmp_path: Path) -> None:
    models = models_of(tmp_path)
    args = transfer(models, models / "out-{alpha}", "--alpha", "0,0.7", "--vocab-mismatch", "overlap")
    done = run_rv(*args)
    assert (done.status, done.stderr) == (0, "")
    assert_same(read_checkpoint(models / "out-0"), read_checkpoint(models / "target"))
    assert_same(read_checkpoint(models / "out-0.7"), wanted(models, 1900))


def vectors_of(folder: Path) -> tuple[Path, dict[str, dict[str, Raw]]]:
    """A target of 2048 rows and two stored vectors, one of them with 1901."""
    models = models_of(folder, {"target": 2048, "donor": 2048, "reference": 1901}, dtypes=dict.fromkeys(ROLES, "F32"))
    return models, {role: read_checkpoint(models / role) for role in ROLES}


@pytest.mark.parametrize("operation", ["apply", "task_arithmetic"])
def test_rows_that_one_of_two_vectors_lacks_get_the_other(tmp_path: Path, operation: Any) -> None:
    """And, where their sum is normalized, divided by the alpha of the other."""
    models, tensors = vectors_of(tmp_path)
    normalize = operation == "task_arithmetic"
    vectors = (rv.Vector(str(models / "donor")), rv.Vector(str(models / "reference")))
    recipe = rv.Recipe(operation, str(models / "target"), vectors, ((0.5, 0.25),), normalize=normalize)
    options, how = rv.PlanOptions(vocab_mismatch="overlap"), rv.RunOptions(runtime="local")
    rv.prepare(recipe, [str(models / "out")], options, how).run()
    found = read_checkpoint(models / "out")
    for name, raw in tensors["target"].items():
        t, one, other = (np.frombuffer(tensors[role][name].data, np.float32) for role in ROLES)
        both = 0.5 * one[: other.size] + np.float32(0.25) * other
        alone = np.float32(0.5) * one[other.size :]
        if normalize:
            both, alone = both / np.float32(0.75), alone / np.float32(0.5)
        values = np.frombuffer(found[name].data, np.float32)
        assert np.allclose(values[: other.size], t[: other.size] + both, rtol=1e-6, atol=1e-7)
        assert np.array_equal(values[other.size :], t[other.size :] + alone)
        assert found[name].shape == raw.shape
    ok("verify", models / "out", "--against-inputs")


def test_a_sum_of_models_has_no_rows_to_leave_alone(tmp_path: Path) -> None:
    models, _ = vectors_of(tmp_path)
    vectors = (rv.Vector(str(models / "donor")), rv.Vector(str(models / "reference")))
    recipe = rv.Recipe("linear", None, vectors, ((0.5, 0.5),))
    options, how = rv.PlanOptions(vocab_mismatch="overlap"), rv.RunOptions(runtime="local")
    with pytest.raises(rv.UsageError, match="a sum of models has no target"):
        rv.prepare(recipe, [str(models / "out")], options, how)
