"""The URIs of object stores: what is taken, what is refused, and what stays the same."""

from __future__ import annotations

import pytest

from rv_distributed.checkpoint.uris import join, last_part, parent, within
from rv_distributed.errors import UsageError
from rv_distributed.storage import resolve, resolve_output
from rv_distributed.storage.uris import parse_hub_uri, parse_store_uri


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("s3://bucket/a?region=x&endpoint_override=h:1", "s3://bucket/a?endpoint_override=h:1&region=x"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("gs://anonymous@bucket/a", "gs://bucket/a?anonymous=true"),
        ("abfss://box@account.dfs.core.windows.net/a", "abfs://box@account.dfs.core.windows.net/a"),
        ("hdfs:///a/b", "hdfs:///a/b"),
        ("hdfs://node:8020/a?user=me", "hdfs://node:8020/a?user=me"),
    ],
)
def test_a_uri_has_one_spelling(text: str, resolved: str) -> None:
    assert resolve(text) == resolved
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("s3://key:SECRET@bucket/a", r"credentials are not given in a URI"),
        ("s3://key@bucket/a", r"credentials are not given in a URI"),
        ("gs://user:SECRET@bucket/a", r"credentials are not given in a URI"),
        ("abfs://box:SECRET@account.dfs.core.windows.net/a", r"credentials are not given in a URI"),
        ("s3://bucket/a?access_key=SECRET", r"s3:// has no option access_key; it takes anonymous, endpoint_override"),
        ("abfs://box@account.dfs.core.windows.net/a?sig=SECRET", r"abfs:// has no option sig"),
        ("s3://bucket/a?anonymous", r"the option anonymous has no value"),
        ("s3:///a", r"names no bucket"),
        ("gs://anonymous@/a", r"names no bucket"),
        ("abfs://box/a", r"does not name container and account"),
        ("s3://bucket/../a", r"is no address of a folder"),
        ("s3://bucket/a#b", r"is no address of a folder"),
        ("s4://bucket/a", r"there is no storage for s4:// here, only for file, hf, s3, gs, abfs and hdfs"),
    ],
)
def test_a_uri_that_cannot_be_used_is_refused_without_its_secret(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        resolve(text)
    assert "SECRET" not in str(refused.value)


def test_options_stay_behind_the_files_of_a_folder() -> None:
    assert join("s3://bucket/a?region=x", "b/c") == "s3://bucket/a/b/c?region=x"
    assert join("s3://bucket", "b") == "s3://bucket/b"
    assert join("/models/a?b", "c") == "/models/a?b/c"
    assert parse_store_uri(join("s3://bucket/a?region=x", "b")).path == "a/b"
    assert last_part("s3://bucket/a/model?endpoint_override=h/x") == "model"
    assert last_part("/models/a?b") == "a?b"
    assert parent("s3://bucket/a/b?region=x") == "s3://bucket/a?region=x"
    assert parent("hf://org/name@main/b") == "hf://org/name@main"
    assert parent("/models/a?b/c") == "/models/a?b"


def test_what_lies_in_what() -> None:
    assert within("s3://bucket/a/b", "s3://bucket/a")
    assert within("s3://bucket/a", "s3://bucket/a")
    assert not within("s3://bucket/ab", "s3://bucket/a")
    assert not within("s3://bucket/a/b?region=x", "s3://bucket/a")


def test_an_output_without_a_scheme_is_a_local_folder() -> None:
    assert resolve("org/name") == "hf://org/name"
    assert resolve_output("org/name").endswith("/org/name")
    assert resolve_output("hf://org/name") == "hf://org/name"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://org/name", ("org/name", None, "")),
        ("hf://org/name/sub/er", ("org/name", None, "sub/er")),
        ("hf://org/name@v1/sub", ("org/name", "v1", "sub")),
        ("hf://org/name@refs/pr/3/sub", ("org/name", "refs/pr/3", "sub")),
        ("hf://org/name@a%2Fb/sub", ("org/name", "a/b", "sub")),
    ],
)
def test_hub_uris_name_repository_revision_and_path(text: str, parts: tuple[str, str | None, str]) -> None:
    place = parse_hub_uri(text)
    assert place == parts
    assert parse_hub_uri(str(place)) == place
