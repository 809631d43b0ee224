"""A transfer between object stores on Ray: its workers open by name what the driver has planned."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from refusal import run_rv
from servers.stores import StoreServer, unfinished_uploads

from remote.checkpoints import NUMBERS, comparable, content_of, s3_roles


@pytest.fixture
def _no_ray_before() -> Iterator[None]:
    assert not ray.is_initialized()
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_no_ray_before")
def test_workers_of_ray_stream_from_store_to_store(s3: StoreServer, in_s3: str, wanted: dict[str, bytes]) -> None:
    out = s3.uri(f"ray-{next(NUMBERS)}")
    command = ["transfer", *s3_roles(s3, in_s3), "--alpha", "0.7", "--out", out, "--max-shard-size", "21MB"]
    done = run_rv(*command, "--runtime", "ray", "--workers", "2")
    assert done.status == 0, done.stderr
    assert comparable(content_of(out)) == wanted
    assert unfinished_uploads(s3.port) == []
