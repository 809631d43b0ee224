"""The Hub as a storage: the contract of reading, and what is its own, with the real client against a server of ours."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from contract import CONTENT, FILES, FolderContract, Place, read
from huggingface_hub import constants, snapshot_download
from servers.hub import TOKEN, Hub, hub_server

from rv_distributed.errors import InputError, UsageError
from rv_distributed.storage import hub as storage_hub
from rv_distributed.storage import open_folder, open_reader, resolve
from rv_distributed.storage.objects import ObjectReader
from rv_distributed.storage.ranges import RangeReader
from rv_distributed.storage.uris import parse_hub_uri

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server() as hub:
        yield hub


@pytest.fixture(autouse=True)
def _environment(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT, HF_TOKEN and HF_HOME set it when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


class TestHub(FolderContract):
    @pytest.fixture
    def place(self, server: Hub) -> Place:
        def put(name: str, files: Mapping[str, bytes]) -> str:
            repo = f"org/{name}-{next(_NUMBERS)}"
            server.put(repo, dict(files))
            return repo

        return put


def new_repo(server: Hub, files: Mapping[str, bytes] = FILES, *, private: bool = False, gated: bool = False) -> str:
    repo = f"org/model-{next(_NUMBERS)}"
    server.put(repo, dict(files), private=private, gated=gated)
    return repo


def test_a_revision_is_resolved_once_and_every_worker_reads_that_commit(server: Hub) -> None:
    repo = new_repo(server)
    commit = server.repos[repo].refs["main"]
    folder = open_folder(f"hf://{repo}@main")
    assert folder.uri == f"hf://{repo}@{commit}"
    server.put(repo, {"model.safetensors": b"another"})
    assert read(folder.path("model.safetensors"), 0, 300_001) == CONTENT
    assert open_folder(folder.uri).states(FILES) == folder.states(FILES)
    assert open_folder(repo).uri != folder.uri


def test_branches_pull_requests_and_folders_are_named_in_the_uri(server: Hub) -> None:
    repo = new_repo(server)
    server.put(repo, {"sub/a": b"1", "sub/b/c": b"2", "submarine": b"3"}, ref="a/branch")
    server.put(repo, {"x": b"4"}, ref="refs/pr/1")
    folder = open_folder(f"hf://{repo}@a%2Fbranch/sub")
    assert [file.name for file in folder.files()] == ["a", "b/c"]
    assert read(folder.path("b/c"), 0, 1) == b"2"
    assert [file.name for file in open_folder(f"hf://{repo}@refs/pr/1").files()] == ["x"]


def test_the_hub_is_asked_once_where_a_file_is(server: Hub) -> None:
    path = open_folder(new_repo(server)).path("model.safetensors")
    before = len(server.asked)
    for start in range(0, 300_000, 50_000):
        assert read(path, start, start + 50_000) == CONTENT[start : start + 50_000]
    asked = server.asked[before:]
    assert sum("/resolve/" in path for _, path, _ in asked) == 1
    assert sum(nbytes for _, _, nbytes in asked) == 300_000


def test_the_token_stays_with_the_hub(server: Hub) -> None:
    folder = open_folder(new_repo(server, private=True))
    assert read(folder.path("model.safetensors"), 5, 9) == CONTENT[5:9]
    assert server.leaked == []


def test_an_address_that_is_good_no_more_is_asked_for_again(server: Hub) -> None:
    path = open_folder(new_repo(server)).path("model.safetensors")
    storage_hub._LOCATIONS[parse_hub_uri(path)] = f"{server.endpoint}/no/such/address"
    assert read(path, 5, 9) == CONTENT[5:9]


def test_what_is_in_the_cache_is_read_from_there(server: Hub) -> None:
    repo = new_repo(server)
    snapshot_download(repo, allow_patterns=["model.safetensors", "config.json"])
    folder = open_folder(repo)
    before = len(server.asked)
    with_cache = open_reader(folder.path("model.safetensors"))
    assert isinstance(with_cache, RangeReader)
    assert read(folder.path("model.safetensors"), 5, 9) == CONTENT[5:9]
    assert folder.read("config.json") == b"{}"
    assert len(server.asked) == before
    assert isinstance(open_reader(folder.path("code/model.py")), ObjectReader)


def test_offline_the_cache_is_all_there_is(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = new_repo(server)
    online = open_folder(repo)
    snapshot_download(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    storage_hub._listing_at.cache_clear()
    folder = open_folder(repo)
    assert (folder.uri, folder.files()) == (online.uri, online.files())
    assert folder.read("model.safetensors") == CONTENT
    with pytest.raises(InputError, match=r"is not in the local cache, and HF_HUB_OFFLINE is set"):
        open_folder(new_repo(server))


@pytest.mark.parametrize(
    ("hidden", "uri", "what"),
    [
        ("", "org/nothing", r"Repository Not Found .* There is no local folder org/nothing, either"),
        ("private", "", r"Repository Not Found .* log in \(hf auth login, or HF_TOKEN\)"),
        ("gated", "", r"Access to model org/model-\d+ is restricted. .* accept its terms"),
        ("", "@nobranch", r"Revision Not Found .* Check the revision"),
    ],
    ids=["missing", "private", "gated", "no such revision"],
)
def test_the_hub_itself_says_what_is_wrong(
    server: Hub, monkeypatch: pytest.MonkeyPatch, hidden: str, uri: str, what: str
) -> None:
    repo = new_repo(server, private=hidden == "private", gated=hidden == "gated")
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(InputError, match=what):
        open_folder(uri if "/" in uri else repo + uri)


def test_names_that_lead_out_of_a_folder_are_refused(server: Hub) -> None:
    with pytest.raises(InputError, match=r"holds an object whose name is none that a file in a folder could have"):
        open_folder(new_repo(server, {"../../etc/passwd": b""})).files()


@pytest.mark.parametrize(
    "uri", ["hf://org", "hf://org/", "hf:///name", "hf://org/..", "hf://org/name@", "hf://a/b?x=1"]
)
def test_what_names_no_repository_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError, match="names no repository"):
        open_folder(uri)


def test_a_local_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/name")
    assert resolve("org/name") == str(tmp_path / "org" / "name")
    assert resolve("org/other") == "hf://org/other"
    assert resolve("org/other@main") == "hf://org/other@main"
    assert resolve("./org/other") == str(tmp_path / "org" / "other")
    assert resolve("other") == str(tmp_path / "other")
