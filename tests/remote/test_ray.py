"""A transfer between object stores on Ray: its workers open by name what the driver has planned."""

from __future__ import annotations

import subprocess
import sys

from servers.stores import StoreServer, unfinished_uploads

from remote.checkpoints import NUMBERS, comparable, content_of, s3_roles


def test_workers_of_ray_stream_from_store_to_store(s3: StoreServer, in_s3: str, wanted: dict[str, bytes]) -> None:
    """In a process of its own: a Ray that rv starts has a token, and Ray remembers it for all that come after."""
    out = s3.uri(f"ray-{next(NUMBERS)}")
    command = [sys.executable, "-m", "rv_distributed", "transfer", *s3_roles(s3, in_s3), "--alpha", "0.7"]
    command += ["--out", out, "--max-shard-size", "21MB", "--runtime", "ray", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert comparable(content_of(out)) == wanted
    assert unfinished_uploads(s3.port) == []
