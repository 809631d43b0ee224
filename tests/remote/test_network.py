"""Runs over a network that refuses, cuts, loses and delays, and how much goes over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import NUMBERS, OPTIONS, comparable, content_of, copy_in, is_data, s3_roles
from refusal import run_rv
from servers.proxy import proxy_to, times
from servers.stores import StoreServer, unfinished_uploads


@pytest.mark.parametrize("kind", ["s3", "gs"])
@pytest.mark.parametrize("what", ["503", "reset", "lost"])
def test_what_a_network_does_is_got_over(
    request: pytest.FixtureRequest, kind: str, what: str, in_s3: str, models: Path, wanted: dict[str, bytes]
) -> None:
    """Bursts of refusals, answers that are cut in the middle of a body, and answers that are lost."""
    server: StoreServer = request.getfixturevalue("s3" if kind == "s3" else "gcs")
    copy_in(server, models, in_s3)
    with proxy_to(server.port) as proxy:
        out = server.uri(f"faults-{next(NUMBERS)}", proxy.port)
        hits = {"503": 5, "reset": 4, "lost": 3}[what]
        proxy.trouble = times(hits, what, when=lambda method, path: is_data(method, path))
        done = run_rv("transfer", *s3_roles(server, in_s3, proxy.port), "--alpha", "0.7", "--out", out, *OPTIONS)
        assert done.status == 0, done.stderr
        assert comparable(content_of(server.uri(out.partition("models/")[2].partition("?")[0]))) == wanted
    if kind == "s3":
        assert unfinished_uploads(server.port) == []
