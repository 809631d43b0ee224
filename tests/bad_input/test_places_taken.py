"""What lies where an output is to go, and is not for us to replace."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusal import assert_refused, make_models, transfer


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("kind", ["file", "link to a file"])
def test_a_file_is_not_replaced(tmp_path: Path, kind: str, more: tuple[str, ...]) -> None:
    models = make_models(tmp_path / "models")
    out = tmp_path / "notes.md"
    (tmp_path / "mine").write_text("precious")
    out.symlink_to(tmp_path / "mine") if kind != "file" else out.write_text("precious")
    told = "is no folder, so --overwrite leaves it alone. Give another --out, or move it away yourself."
    assert_refused(tmp_path, transfer(models, out, *more), told)
    assert out.read_text() == "precious"
