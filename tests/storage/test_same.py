"""Two files side by side, window by window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rv_distributed.storage.same import same_bytes, windows

SIZE = (8 << 20) + 12_345


@pytest.mark.parametrize("starts", [(0, 0), (4096, 0), (77, 5001)])
def test_windows_are_the_bytes_of_both_from_their_own_offsets(tmp_path: Path, starts: tuple[int, int]) -> None:
    rng, wanted, places = np.random.default_rng(0), [], []
    for number, start in enumerate(starts):
        path, data = tmp_path / str(number), rng.bytes(start + SIZE + 10)
        path.write_bytes(data)
        places.append((str(path), start))
        wanted.append(data[start : start + SIZE])
    got = [bytearray(), bytearray()]
    for pair in windows(places[0], places[1], SIZE):
        assert len(pair[0]) in (8 << 20, 12_345)
        for mine, window in zip(got, pair, strict=True):
            mine += window
    assert got == wanted


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
