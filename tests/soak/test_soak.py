"""A few rounds of the soak, always the same ones."""

from __future__ import annotations

import pytest
from faults.harness import why_no_shim

from soak.__main__ import soak


def test_a_few_rounds(capsys: pytest.CaptureFixture[str]) -> None:
    if why := why_no_shim():
        pytest.skip(why)
    assert soak(5, 100, most_rounds=5) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "| times |" in printed
    assert "5 checkpoints" in printed
    assert " 0 bytes lost" in printed
