"""What of the library's log is shown beside progress, as text: what is amiss, and why nothing happens at first."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest

from rv_distributed.cli.progress import progress_display
from rv_distributed.logs import COMPILING


@pytest.mark.parametrize(
    ("shown", "wanted"), [(True, "compiling f, once\nwarning: lost worker w\n"), (False, "")], ids=["shown", "quiet"]
)
def test_compiling_is_shown_and_of_the_rest_what_is_amiss(
    capsys: pytest.CaptureFixture[str], shown: bool, wanted: str
) -> None:
    with progress_display(cast(Any, None), "text", shown=shown):
        logging.getLogger(COMPILING).info("compiling %s, once", "f")
        logging.getLogger("rv_distributed.runtime").info("worker w is up")
        logging.getLogger("rv_distributed.runtime").warning("lost worker %s", "w")
    assert capsys.readouterr().err == wanted
