"""Runs over a network that refuses, cuts, loses and delays, and how much goes over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from refusal import run_rv
from servers.proxy import proxy_to, times
from servers.stores import StoreServer, unfinished_uploads

from remote.checkpoints import NUMBERS, OPTIONS, comparable, content_of, copy_in, is_data, s3_roles


def twice_each(what: str, *, reads_only: bool) -> Callable[[str, str], str | None]:
    """Trouble for the first two requests for the same data."""
    asked: Counter[tuple[str, str]] = Counter()

    def trouble(method: str, path: str) -> str | None:
        if not is_data(method, path) or (reads_only and method != "GET"):
            return None
        asked[method, path] += 1
        return what if asked[method, path] <= 2 else None

    return trouble


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
        # fake-gcs-server adds a part that comes again a second time, as Google does not.
        proxy.trouble = twice_each(what, reads_only=kind == "gs" and what != "503")
        done = run_rv("transfer", *s3_roles(server, in_s3, proxy.port), "--alpha", "0.7", "--out", out, *OPTIONS)
        assert done.status == 0, done.stderr
        assert comparable(content_of(server.uri(out.partition("models/")[2].partition("?")[0]))) == wanted
    if kind == "s3":
        assert unfinished_uploads(server.port) == []


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_every_byte_goes_over_the_wire_once(
    request: pytest.FixtureRequest, kind: str, in_s3: str, models: Path
) -> None:
    server: StoreServer = request.getfixturevalue("s3" if kind == "s3" else "gcs")
    copy_in(server, models, in_s3)
    weights = sum(path.stat().st_size for path in models.glob("target/*.safetensors"))
    with proxy_to(server.port) as proxy:
        out = server.uri(f"counted-{next(NUMBERS)}", proxy.port)
        done = run_rv("transfer", *s3_roles(server, in_s3, proxy.port), "--alpha", "0.7", "--out", out, *OPTIONS)
        assert done.status == 0, done.stderr
        seen = [request for request in proxy.seen if is_data(request.method, request.path)]
        # Of small models, headers and samples are a part that counts; of large ones they are not.
        looked = 3 * 2 * (256 + 64) * 1024
        assert 3 * weights * 0.99 <= sum(request.received for request in seen) <= 3 * weights + looked + 50_000
        assert weights * 0.99 <= sum(request.sent for request in seen) <= weights * 1.01


def test_inspect_reads_headers_only(s3: StoreServer, in_s3: str) -> None:
    with proxy_to(s3.port) as proxy:
        done = run_rv("inspect", s3.uri(f"{in_s3}/target", proxy.port))
        assert done.status == 0
        assert "layers.0.up" not in done.stdout
        assert "13.01 M in 4 tensors" in done.stdout
        assert proxy.received() < 2 * (256 + 64) * 1024 + 10_000


def test_a_slow_answer_does_not_hold_up_the_others(s3: StoreServer, in_s3: str, wanted: dict[str, bytes]) -> None:
    with proxy_to(s3.port) as proxy:
        out = s3.uri(f"slow-{next(NUMBERS)}", proxy.port)
        proxy.trouble = times(6, "slow", when=is_data)
        done = run_rv("transfer", *s3_roles(s3, in_s3, proxy.port), "--alpha", "0.7", "--out", out, *OPTIONS)
        assert done.status == 0, done.stderr
        assert comparable(content_of(out)) == wanted


def test_what_is_denied_is_named_and_nothing_is_tried_again(s3: StoreServer, in_s3: str) -> None:
    with proxy_to(s3.port) as proxy:
        proxy.trouble = lambda _method, path: "403" if "donor/model-00002" in path else None
        uri = s3.uri(f"{in_s3}/donor", proxy.port)
        done = run_rv("inspect", uri)
        assert done.status == 2
        assert f"{s3.scheme}://models/{in_s3}/donor/model-00002-of-00002.safetensors" in done.stderr
        assert "access denied (AccessDenied 403: not for you)" in done.stderr
        assert sum(request.status == 403 for request in proxy.seen) == 1


def test_credentials_that_have_expired_are_named_while_it_runs(s3: StoreServer, in_s3: str) -> None:
    """They expire when weights are read, long after headers were."""
    with proxy_to(s3.port) as proxy:
        out = s3.uri(f"expired-{next(NUMBERS)}", proxy.port)
        proxy.trouble = lambda method, path: "expired" if method == "PUT" and "partNumber" in path else None
        done = run_rv("transfer", *s3_roles(s3, in_s3, proxy.port), "--alpha", "0.7", "--out", out, *OPTIONS)
        assert done.status == 1
        assert "the credentials have expired; renew them (ExpiredToken 400" in done.stderr
        assert "run the same command again to resume" in done.stderr
    assert unfinished_uploads(s3.port) == []
