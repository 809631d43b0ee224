"""Sizes and times as people write and read them."""

from __future__ import annotations

import pytest

from rv_distributed.errors import UsageError
from rv_distributed.units import parse_bytes, show_bytes, show_count, show_seconds


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("1.5 MB", 1_500_000),
        ("2T", 2_000_000_000_000),
        ("512MiB", 512 << 20),
        ("1KiB", 1024),
    ],
)
def test_sizes_are_decimal_unless_they_say_i(text: str, nbytes: int) -> None:
    assert parse_bytes(text, "--size") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1", "5 GB extra", "iB", "1e9"])
def test_other_sizes_are_refused_by_the_name_of_the_option(text: str) -> None:
    with pytest.raises(UsageError, match="--size"):
        parse_bytes(text, "--size")


def test_numbers_are_shown_with_few_digits() -> None:
    assert [show_bytes(n) for n in (0, 999, 1500, 3.09e9, 1.3e12)] == ["0 B", "999 B", "1.5 kB", "3.09 GB", "1.3 TB"]
    assert [show_bytes(n) for n in (999.6, 999_499, 999_500)] == ["1 kB", "999 kB", "1 MB"]
    assert [show_bytes(n) for n in (999_999_999, 2.5e15, 2e18)] == ["1 GB", "2.5 PB", "2 EB"]
    assert [show_count(n) for n in (999, 999_940, 999_960)] == ["999", "999.9 k", "1 M"]
    assert [show_count(n) for n in (7, 494_032_768, 671e9)] == ["7", "494 M", "671 B"]
    assert [show_seconds(s) for s in (2.34, 125, 7300)] == ["2.3 s", "2 min 5 s", "2 h 1 min"]
