"""Names to layers and modules, sums of groups, and throughput from pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rv_distributed.checkpoint.pieces import PieceRow
from rv_distributed.checkpoint.table import NO_BYTES, TensorRow
from rv_distributed.report.groups import Place, group_by, largest_vectors, place_of, ulps_of
from rv_distributed.report.throughput import shares, throughput


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.12.mlp.up_proj.weight", Place(12, "mlp.up_proj")),
        ("model.layers.3.self_attn.q_proj.bias", Place(3, "self_attn.q_proj.bias")),
        ("model.layers.60.mlp.experts.255.down_proj.weight", Place(60, "mlp.experts.*.down_proj")),
        ("model.language_model.layers.0.mlp.gate.weight", Place(0, "mlp.gate")),
        ("transformer.h.7.attn.c_attn.weight", Place(7, "attn.c_attn")),
        ("model.embed_tokens.weight", Place(None, "embed_tokens")),
        ("lm_head.weight", Place(None, "lm_head")),
        ("layers", Place(None, "layers")),
        ("", Place(None, "")),
    ],
)
def test_a_name_tells_layer_and_module(name: str, place: Place) -> None:
    assert place_of(name) == place


def row(name: str, v: float, t: float, realised: float, **more: object) -> TensorRow:
    columns: tuple[Any, ...] = (
        *(name, "BF16", (10, 10), "model.safetensors", 0, 200, 200, NO_BYTES, (), "combine", ""),
        *(v, t, v / t, 0.0, v, 50, 0.5, 0.5, realised, 0.2, 40, 0.4, 10, 0.2, 3, (30, 10, 0, 0, 0, 0, 0, 0), 0),
        *(0, 0, 0, None),
    )
    return TensorRow(*columns)._replace(**more)  # type: ignore[arg-type]


def test_a_group_weighs_its_tensors_by_the_squares_of_their_vectors() -> None:
    rows = [row("layers.1.a", 3.0, 4.0, 0.4), row("layers.1.b", 4.0, 3.0, 0.8), row("layers.2.a", 1.0, 2.0, 0.5)]
    groups = group_by(rows, lambda row: place_of(row.name).layer)
    assert groups.keys() == {1, 2}
    one = groups[1]
    assert one.v_t_ratio == pytest.approx(5 / 5)
    assert one.realised_alpha == pytest.approx((0.4 * 9 + 0.8 * 16) / 25)
    assert one.relative_error == pytest.approx(0.2)
    assert (one.absorbed_fraction, one.changed_fraction) == (20 / 100, 80 / 200)
    assert ulps_of(rows) == [90, 30, 0, 0, 0, 0, 0, 0]
    assert [found.name for found in largest_vectors(rows, 2)] == ["layers.1.b", "layers.1.a"]


def test_what_was_not_measured_or_is_not_finite_is_no_number() -> None:
    rows = [row("x", math.inf, 1.0, math.nan), row("y", 1.0, 1.0, 0.5, v_norm=None, ulps=None), row("z", 0.0, 1.0, 0.0)]
    groups = group_by(rows, lambda row: row.name)
    assert groups.keys() == {"x", "z"}
    assert groups["x"].v_t_ratio is groups["x"].realised_alpha is groups["z"].realised_alpha is None
    assert [found.name for found in largest_vectors(rows)] == ["z"]


def test_throughput_adds_up_to_the_bytes_and_kept_pieces_are_nobody_s() -> None:
    made = [PieceRow(n, "s", 0, 9, f"w{n % 3}", 1 + (n == 5), n / 10, 1.0, 2.0, 3.0, 30, 100) for n in range(1, 41)]
    found = throughput([PieceRow(0, "s", 0, 9), *made])
    width = found.ends_s[0]
    assert found.ends_s[-1] == pytest.approx(4.0)
    assert {worker: round(sum(rates) * width) for worker, rates in found.rates.items()} == {
        "w0": 1300,
        "w1": 1400,
        "w2": 1300,
    }
    assert [(one.worker, one.pieces, one.bytes_written, one.write_s, one.retried) for one in shares(made)] == [
        ("w0", 13, 1300, 39.0, 0),
        ("w1", 14, 1400, 42.0, 0),
        ("w2", 13, 1300, 39.0, 1),
    ]
    assert throughput([PieceRow(0, "s", 0, 9)]).ends_s == []
