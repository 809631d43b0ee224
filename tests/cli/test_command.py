"""What is missing of a command's options and arguments is named, all of it."""

from __future__ import annotations

import pytest
from refusal import run_rv


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["transfer"], "Missing option '--target', '--donor', '--reference', '--out'."),
        (["transfer", "--donor", "d", "--out", "o"], "Missing option '--target', '--reference'."),
        (["diff"], "Missing argument 'A', 'B'."),
        (["submit", "--", "transfer", "--target", "t"], "Missing option '--address' (or RV_SUBMIT_ADDRESS or "),
        (["submit", "--address", "a", "--", "extract", "--out", "/o"], "Missing option '--donor', '--reference'."),
    ],
    ids=" ".join,
)
def test_all_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, args: list[str], told: str) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RV_SUBMIT_ADDRESS", "RV_TRANSFER_REFERENCE"):
        monkeypatch.delenv(name, raising=False)
    done = run_rv(*args)
    assert done.status == 2
    assert f"Error: {told}" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_environment_gives_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RV_TRANSFER_REFERENCE", "r")
    assert "Missing option '--target', '--donor', '--out'." in run_rv("transfer").stderr
