"""Comparing files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rv_distributed.storage.same import same_bytes

SIZE = (8 << 20) + 12_345


def test_files_are_the_same_up_to_their_last_byte(tmp_path: Path) -> None:
    data = bytearray(np.random.default_rng(1).bytes(SIZE))
    for name in ("a", "b", "c"):
        data[-1] ^= name == "c"
        (tmp_path / name).write_bytes(data)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert same_bytes(a, b, SIZE)
    assert not same_bytes(a, c, SIZE)
    with pytest.raises(OSError, match="ends"):
        same_bytes(a, b, SIZE + 1)
