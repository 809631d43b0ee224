"""Names to layers and modules, sums of groups, and throughput from pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rv_distributed.checkpoint.names import Place, place_of, short_name
from rv_distributed.checkpoint.pieces import PieceRow
from rv_distributed.checkpoint.table import NO_BYTES, TensorRow
from rv_distributed.report.groups import (
    by_layer,
    group_by,
    largest_vectors,
    ulps_of,
)
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
        ("model.decoder.layers.3.fc1.weight", Place(3, "decoder.fc1", "decoder")),
        ("model.visual.blocks.3.attn.qkv.weight", Place(3, "visual.attn.qkv", "visual")),
        ("language_model.model.embed_tokens.weight", Place(None, "embed_tokens")),
        ("relayers.3.x", Place(None, "relayers.3.x")),
        ("layers.٣.x", Place(None, "layers.٣.x")),
        ("layers", Place(None, "layers")),
        ("", Place(None, "")),
    ],
)
def test_a_name_tells_layer_and_module(name: str, place: Place) -> None:
    assert place_of(name) == place


def row(name: str, v: float, t: float, realised: float, **more: object) -> TensorRow:
    columns: tuple[Any, ...] = (
        *(name, "BF16", (10, 10), "model.safetensors", 0, 200, 200, NO_BYTES, (), "combine", "", "", "", ""),
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


def test_layers_of_two_stacks_are_not_added_up() -> None:
    names = ("model.encoder.layers.0.a", "model.decoder.layers.0.a", "model.norm")
    layers, elsewhere = by_layer([row(name, 3.0, 4.0, alpha) for name, alpha in zip(names, (0.4, 0.8, 1), strict=True)])
    assert {layer: group.realised_alpha for layer, group in layers.items()} == {
        ("decoder", 0): pytest.approx(0.8),
        ("encoder", 0): pytest.approx(0.4),
    }
    assert elsewhere is not None
    assert elsewhere.realised_alpha == 1


def test_what_basic_statistics_leave_out_is_no_zero() -> None:
    basic: dict[str, object] = {"realised_alpha": None, "relative_error": None}
    one = group_by([row("a", 3.0, 4.0, 0.4), row("b", 3.0, 4.0, 0.4, **basic)], lambda _: 0)[0]
    assert one.realised_alpha is one.relative_error is None
    assert one.v_t_ratio == pytest.approx(0.75)
    # Without a vector there is nothing to be realised, and it has no weight.
    two = group_by([row("a", 3.0, 4.0, 0.4), row("b", 3.0, 4.0, 0.4, v_norm=0.0, **basic)], lambda _: 0)[0]
    assert two.realised_alpha == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.60.mlp.experts.255.down_proj.weight", "60.mlp.experts.255.down_proj"),
        ("model.decoder.layers.3.fc1.weight", "decoder.3.fc1"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("x" * 20 + "y" * 20, "x" * 13 + "…" + "y" * 14),
    ],
)
def test_axes_have_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_beyond_six_workers_the_others_are_one_and_no_byte_is_lost() -> None:
    made = [PieceRow(n, "s", 0, 9, f"w{n % 40:02}", 1, n / 10, 0.0, 0.0, 0.0, 30, 100 + n % 40) for n in range(1, 401)]
    found = throughput(made)
    assert list(found.rates) == [*(f"w{n}" for n in range(35, 40)), "35 others"]
    written = sum(sum(rates) for rates in found.rates.values()) * found.ends_s[0]
    assert written == pytest.approx(sum(piece.bytes_written or 0 for piece in made))


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
