"""Whole runs whose inputs and outputs lie in object stores, against the same run on local folders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import weights, write_checkpoint
from refusal import run_rv
from servers.stores import BUCKET, S3_SECRETS, StoreServer, fake_gcs, moto, s3_client, unfinished_uploads

from rv_distributed.checkpoint.manifest import MANIFEST_FILE
from rv_distributed.storage import open_folder, open_store

_NUMBERS = itertools.count()
ROLES = ("target", "donor", "reference")
CONFIG = b'{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 16}'
#: Of a few megabytes each, in shards that take several parts, and small ones.
SHAPES = {"embed": (3000, 1000), "layers.1.up": (1, 1), "layers.0.up": (5000, 2001), "norm": (1003,)}
OPTIONS = ("--max-shard-size", "21MB", "--runtime", "local")
SHARDS = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target, donor and reference, in two shards each."""
    folder = tmp_path_factory.mktemp("models")
    for number, role in enumerate(ROLES):
        rng = np.random.default_rng(number)
        tensors = {name: weights(rng, "BF16", shape) for name, shape in SHAPES.items()}
        sidecars = {"config.json": CONFIG, "tokenizer/vocab.txt": b"a\nb\n"}
        write_checkpoint(folder / role, tensors, shards=2, sidecars=sidecars)
    return folder


@pytest.fixture(scope="module")
def wanted(models: Path) -> dict[str, bytes]:
    """What a transfer between local folders makes, but for the files that say when and how fast."""
    assert run_rv("transfer", *roles(models), "--alpha", "0.7", "--out", models / "out", *OPTIONS).status == 0
    return comparable({p.relative_to(models / "out").as_posix(): p.read_bytes() for p in files_of(models / "out")})


@pytest.fixture(scope="module")
def s3() -> Iterator[StoreServer]:
    with moto() as server:
        yield server


@pytest.fixture(scope="module")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with fake_gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def in_s3(models: Path, s3: StoreServer) -> str:
    """The folder of the three models in S3."""
    client = s3_client(s3.port)
    for role in ROLES:
        for path in files_of(models / role):
            client.upload_file(str(path), BUCKET, f"in/{path.relative_to(models).as_posix()}")
    return "in"


def roles(folder: Path | str, options: str = "") -> list[str]:
    return [text for role in ROLES for text in (f"--{role}", f"{folder}/{role}{options}")]


def s3_roles(server: StoreServer, folder: str, port: int | None = None) -> list[str]:
    return [text for role in ROLES for text in (f"--{role}", server.uri(f"{folder}/{role}", port))]


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def comparable(content: dict[str, bytes]) -> dict[str, bytes]:
    """Without what differs from run to run, or with the pieces and the names of inputs."""
    told = (MANIFEST_FILE, "rv_pieces.parquet", "rv_tensors.parquet", "README.md")
    return {name: data for name, data in content.items() if name not in told}


def content_of(uri: str) -> dict[str, bytes]:
    folder = open_folder(uri)
    return {file.name: folder.read(file.name) for file in folder.files()}


def keys_below(uri: str) -> set[str]:
    store, key = open_store(uri)
    return {found.key.removeprefix(f"{key}/") for found in store.list(f"{key}/")}


def test_a_transfer_from_s3_to_s3_makes_the_bytes_of_a_local_one(
    s3: StoreServer, in_s3: str, wanted: dict[str, bytes]
) -> None:
    out = s3.uri(f"out-{next(_NUMBERS)}")
    command = ["transfer", *s3_roles(s3, in_s3), "--alpha", "0.7", "--out", out, *OPTIONS]
    done = run_rv(*command)
    assert done.status == 0, done.stderr
    assert comparable(content_of(out)) == wanted
    assert not any(name.startswith(".rv/") for name in keys_below(out))
    assert unfinished_uploads(s3.port) == []
    assert run_rv("verify", out).status == 0
    assert run_rv("verify", out, "--against-inputs").status == 0
    again = run_rv(*command)
    assert again.status == 0
    assert "already complete" in again.stdout
