"""The contract of `ObjectStore`, held by each store against a server that is not ours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from contract import FolderContract, Place, StoreContract
from pyarrow.fs import LocalFileSystem
from servers.stores import AZURE_SECRETS, S3_SECRETS, StoreServer, azurite, fake_gcs, has_node_servers, moto, s3rver

from rv_distributed.storage import open_folder, stores
from rv_distributed.storage.arrow import ArrowStore
from rv_distributed.storage.uris import StoreUri

_NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (S3_SECRETS | AZURE_SECRETS).items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def moto_server() -> Iterator[StoreServer]:
    with moto() as server:
        yield server


@pytest.fixture(scope="module")
def s3rver_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with s3rver(tmp_path_factory.mktemp("s3rver")) as server:
        yield server


@pytest.fixture(scope="module")
def azurite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(*next(iter(AZURE_SECRETS.items())))
        with azurite(tmp_path_factory.mktemp("azurite")) as server:
            yield server


@pytest.fixture(scope="module")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with fake_gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


class TestMotoS3(StoreContract):
    @pytest.fixture
    def root(self, moto_server: StoreServer) -> str:
        return moto_server.uri(f"test-{next(_NUMBERS)}")


@pytest.mark.slow
@pytest.mark.skipif(not has_node_servers(), reason="no servers in Node are installed")
class TestS3rver(StoreContract):
    @pytest.fixture
    def root(self, s3rver_server: StoreServer) -> str:
        return s3rver_server.uri(f"test-{next(_NUMBERS)}")


class TestGoogle(StoreContract):
    @pytest.fixture
    def root(self, gcs_server: StoreServer) -> str:
        return gcs_server.uri(f"test-{next(_NUMBERS)}")


@pytest.mark.slow
@pytest.mark.skipif(not has_node_servers(), reason="no servers in Node are installed")
class TestAzurite(StoreContract):
    @pytest.fixture
    def root(self, azurite_server: StoreServer) -> str:
        return azurite_server.uri(f"test-{next(_NUMBERS)}")

    def test_a_state_is_that_of_the_content(self, place: Place) -> None:
        """Arrow tells of Azure's objects only their size, and the second in which they were made."""
        folder = open_folder(place("checkpoint", {"a": b"1"}))
        before = folder.states(["a"])
        place("checkpoint", {"a": b"22"})
        assert folder.states(["a"]) != before


class TestArrow(StoreContract):
    """Arrow's local file system in the place of HDFS, which has no server here."""

    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        def open_local(uri: StoreUri) -> ArrowStore:
            return ArrowStore(LocalFileSystem(), str(tmp_path), uri, makes_folders=True)

        monkeypatch.setattr("rv_distributed.storage.arrow.open_arrow_store", open_local)
        stores.store_of.cache_clear()
        return "hdfs://namenode:8020/out"


class TestPosix(FolderContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        def put(name: str, files: Mapping[str, bytes]) -> str:
            for file, content in files.items():
                path = tmp_path / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return str(tmp_path / name)

        return put
