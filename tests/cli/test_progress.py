"""Progress lines: how often, and what speed they tell; and what of the library's log is shown beside them."""

from __future__ import annotations

import logging

import pytest

from rv_distributed.cli import progress as module
from rv_distributed.logs import COMPILING
from rv_distributed.watching import Progress


def at(written: int) -> Progress:
    return Progress(1, 10, 0, written, 1000, 0.0, {})


def test_the_speed_is_that_since_the_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    lines: list[tuple[int, float]] = []
    show = module._every_few_seconds(lambda progress, speed: lines.append((progress.bytes_written, speed)))
    for now, written in ((130.0, 100), (130.1, 300), (132.0, 300), (136.0, 700), (138.0, 800), (141.0, 980)):
        clock[0] = now
        show(at(written))
    assert lines == [(700, 100.0), (980, 80.0)]


@pytest.mark.parametrize(
    ("shown", "wanted"), [(True, "compiling f, once\nwarning: lost worker w\n"), (False, "")], ids=["shown", "quiet"]
)
def test_compiling_is_shown_and_of_the_rest_what_is_amiss(
    capsys: pytest.CaptureFixture[str], shown: bool, wanted: str
) -> None:
    with module.progress_display(None, "text", shown=shown):
        logging.getLogger(COMPILING).info("compiling %s, once", "f")
        logging.getLogger("rv_distributed.runtime").info("worker w is up")
        logging.getLogger("rv_distributed.runtime").warning("lost worker %s", "w")
    assert capsys.readouterr().err == wanted


def test_a_command_that_is_no_run_tells_its_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with module.bytes_display("compared", shown=True) as show:
        for now, done in ((101.0, 0), (111.0, 1_000_000)):
            clock[0] = now
            show(done, 4_000_000)
    assert capsys.readouterr() == ("", " 25%  1 MB of 4 MB compared, 100 kB/s, 30.0 s left\n")
