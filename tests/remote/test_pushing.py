"""``rv push`` with the real client, against a Hub of ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from refusal import run_rv
from schemas import strict
from servers.hub import Hub, hub_server

import rv_distributed as rv
from remote.checkpoints import OPTIONS, files_of, roles, run_with_hub


@pytest.fixture
def hub() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture(scope="module")
def output(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pushed") / "out"
    assert run_rv("transfer", *roles(models), "--out", out, *OPTIONS).status == 0
    return out


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files_of(out)}


def there(hub: Hub, repo: str, ref: str = "main") -> dict[str, bytes]:
    found = hub.repos[repo]
    return {name: data for name, data in found.commits[found.refs[ref]].items() if name != ".gitattributes"}


def test_an_output_arrives_whole_in_a_private_repository(hub: Hub, output: Path, tmp_path: Path) -> None:
    done = run_with_hub(hub, tmp_path, "push", str(output), "org/made")
    assert done.returncode == 0, done.stderr
    commit = hub.repos["org/made"].refs["main"]
    assert done.stdout == f"{hub.endpoint}/org/made/commit/{commit}\n  commit {commit}, private\n"
    assert "data set" not in done.stderr
    assert there(hub, "org/made") == content(output)
    assert hub.repos["org/made"].private
    # What an earlier output left would be taken for a part of this one.
    stale = {**there(hub, "org/made"), "model-00001-of-00009.safetensors": b"x", "notes.txt": b"mine"}
    hub.put("org/made", stale)
    again = run_with_hub(hub, tmp_path, "push", str(output), "org/made", "--public", "--json")
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout)
    schema = Path(rv.__file__).parent / "schemas" / "pushed.schema.json"
    jsonschema.validate(document, strict(json.loads(schema.read_text())))
    assert document["private"] is True
    assert again.stderr.count("\n") == 1
    assert "warning: org/made was there before, and is private" in again.stderr
    assert there(hub, "org/made") == content(output) | {"notes.txt": b"mine"}


def test_branches_pull_requests_and_public_repositories(hub: Hub, output: Path, tmp_path: Path) -> None:
    hub.put("org/made", {"README.md": b"hello"})
    done = run_with_hub(hub, tmp_path, "push", str(output), "org/made", "--create-pr", "--quiet")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert there(hub, "org/made") == {"README.md": b"hello"}
    assert there(hub, "org/made", "refs/pr/1") == content(output)
    done = run_with_hub(hub, tmp_path, "push", str(output), "org/new", "--revision", "v2", "--public")
    assert done.returncode == 0, done.stderr
    assert there(hub, "org/new", "v2") == content(output)
    assert not hub.repos["org/new"].private


def test_a_push_that_was_cut_short_goes_on(hub: Hub, output: Path, tmp_path: Path) -> None:
    hub.broken_uploads = 1
    failed = run_with_hub(hub, tmp_path, "push", str(output), "org/made")
    assert failed.returncode == 1
    assert "hf://org/made: the upload failed" in failed.stderr
    arrived, asked = set(hub.blobs), len(hub.asked)
    assert arrived
    done = run_with_hub(hub, tmp_path, "push", str(output), "org/made")
    assert done.returncode == 0, done.stderr
    assert there(hub, "org/made") == content(output)
    sent = {path.rpartition("/")[2] for method, path, _ in hub.asked[asked:] if method == "PUT"}
    assert sent
    assert not sent & arrived


def test_what_is_not_as_it_was_written_is_not_pushed(hub: Hub, output: Path, tmp_path: Path, models: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, data in content(output).items():
        (damaged / name).parent.mkdir(exist_ok=True)
        (damaged / name).write_bytes(data)
    (damaged / "config.json").write_bytes(b"{}")
    (damaged / "extra.bin").write_bytes(b"")
    refused = run_with_hub(hub, tmp_path, "push", str(damaged), "org/made")
    assert refused.returncode == 3
    assert "config.json: has 2 bytes instead of" in refused.stderr
    assert "extra.bin: is not in the manifest" in refused.stderr
    none = run_with_hub(hub, tmp_path, "push", str(models / "target"), "org/made")
    assert none.returncode == 2
    assert "rv_manifest.json: does not exist" in none.stderr
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("repo", "token", "options", "what"),
    [
        ("bob/made", None, (), "ada is no member of bob"),
        ("org/made", "", (), "Log in with hf auth login"),
        ("org/made", None, ("--create-pr", "--revision", "v2"), "give no --revision with it"),
        ("made", None, (), "names no repository"),
        ("org/made/sub", None, (), "names a folder in a repository"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_sent(
    hub: Hub, output: Path, tmp_path: Path, repo: str, token: str | None, options: tuple[str, ...], what: str
) -> None:
    more = {} if token is None else {"HF_TOKEN": token}
    done = run_with_hub(hub, tmp_path, "push", str(output), repo, *options, **more)
    assert done.returncode == 2
    assert what in done.stderr
    assert hub.repos == {}
