"""The table of pieces: rows come back as they were, and what is none of ours is refused."""

from __future__ import annotations

import pytest

from rv_distributed.checkpoint.pieces import PieceRow, read_pieces, write_pieces
from rv_distributed.checkpoint.table import write_table

ROWS = [
    PieceRow(0, "model-00001-of-00002.safetensors", 0, 2**26, "node:17", 2, 1.5, 0.25, 0.5, 0.125, 2**28, 2**26),
    PieceRow(1, "model-00002-of-00002.safetensors", 0, 2**41),
]


def test_rows_come_back_as_they_were_written() -> None:
    assert read_pieces(write_pieces(ROWS)) == ROWS
    assert read_pieces(write_pieces([])) == []


@pytest.mark.parametrize("raw", [b"", b"PAR1", write_pieces(ROWS)[:-9], write_table([])], ids=len)
def test_what_is_no_table_of_pieces_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match="is not a table of pieces"):
        read_pieces(raw)
