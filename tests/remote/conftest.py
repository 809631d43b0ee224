"""Checkpoints and servers for runs on object stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import weights, write_checkpoint
from refusal import run_rv
from servers.stores import BUCKET, S3_SECRETS, StoreServer, fake_gcs, moto, s3_client

from remote.checkpoints import CONFIG, OPTIONS, ROLES, SHAPES, comparable, files_of, roles


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """target, donor and reference, in two shards each."""
    folder = tmp_path_factory.mktemp("models")
    for number, role in enumerate(ROLES):
        rng = np.random.default_rng(number)
        tensors = {name: weights(rng, "BF16", shape) for name, shape in SHAPES.items()}
        sidecars = {"config.json": CONFIG, "tokenizer/vocab.txt": b"a\nb\n"}
        write_checkpoint(folder / role, tensors, shards=2, sidecars=sidecars)
    return folder


@pytest.fixture(scope="session")
def wanted(models: Path) -> dict[str, bytes]:
    """What a transfer between local folders makes, but for the files that say when and how fast."""
    assert run_rv("transfer", *roles(models), "--alpha", "0.7", "--out", models / "out", *OPTIONS).status == 0
    return comparable({p.relative_to(models / "out").as_posix(): p.read_bytes() for p in files_of(models / "out")})


@pytest.fixture(scope="session")
def s3() -> Iterator[StoreServer]:
    with moto() as server:
        yield server


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with fake_gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3_SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def in_s3(models: Path, s3: StoreServer) -> str:
    """The folder of the three models in S3."""
    client = s3_client(s3.port)
    for role in ROLES:
        for path in files_of(models / role):
            client.upload_file(str(path), BUCKET, f"in/{path.relative_to(models).as_posix()}")
    return "in"
