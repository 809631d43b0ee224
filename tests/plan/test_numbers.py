"""Tensors as they are computed with: what two sources with one base differ in, and what a task needs of a source."""

from __future__ import annotations

from dataclasses import replace

from fp8_reference import fp8_config
from reference import described

from rv_distributed.checkpoint.sources import BlockScaled, Box, Gathered, LowRank, Operand, shifted
from rv_distributed.plan import PlanOptions, as_numbers, make_plan, task_of
from rv_distributed.plan.model import Requantized, VectorOperand
from rv_distributed.plan.numbers import difference
from rv_distributed.recipe import Recipe, Vector

BASE = Operand("/base", 0, "BF16")
ONE = LowRank(BASE, Operand("/one", 0, "F32"), Operand("/one", 64, "F32"), 2, 8, 4, 0.5, False)
OTHER = ONE._replace(left=Operand("/other", 0, "F32"), scale=2.0)


def test_a_base_that_both_sides_stand_on_is_left_out() -> None:
    assert difference(3, ONE, BASE) == VectorOperand(3, ONE._replace(base=None), None)
    assert difference(3, BASE, ONE) == VectorOperand(3, ONE._replace(base=None, scale=-0.5), None)
    assert difference(0, ONE, OTHER) == VectorOperand(0, ONE._replace(base=None), OTHER._replace(base=None))
    assert difference(0, shifted(ONE, -3), shifted(BASE, -3)) == VectorOperand(
        0, ONE._replace(base=None, first=-3), None
    )


def test_the_same_from_the_same_place_is_no_vector() -> None:
    assert difference(0, BASE, BASE) is None
    assert difference(0, ONE, ONE) is None


def test_everything_else_is_subtracted_as_it_is() -> None:
    elsewhere = BASE._replace(offset=2)
    assert difference(0, ONE, elsewhere) == VectorOperand(0, ONE, elsewhere)
    assert difference(0, shifted(ONE, 3), BASE) == VectorOperand(0, shifted(ONE, 3), BASE)
    assert difference(0, BASE, None) == VectorOperand(0, BASE, None)
    assert difference(0, ONE, None) == VectorOperand(0, ONE, None)


def test_scales_are_no_tensors_and_weights_become_bfloat16() -> None:
    model = described(
        "/m", {"up.weight": ("F8_E4M3", (300, 200)), "up.weight_scale_inv": ("F32", (3, 2)), "norm": ("F32", (4,))}
    )
    found, problems = as_numbers({"m": replace(model, config=fp8_config())})
    assert problems == []
    tensors = found["m"].tensors
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {"up.weight": "BF16", "norm": "F32"}
    file = "/m/model.safetensors"
    source = BlockScaled(Operand(file, 8, "F8_E4M3"), Operand(file, 60_008, "F32"), 300, 200, (128, 128))
    assert tensors["up.weight"].source == source
    # Without the config, they are what they are.
    assert as_numbers({"m": model})[0]["m"].tensors == model.tensors


def test_a_task_of_a_requantized_tensor_has_what_its_whole_bands_need() -> None:
    """Bands of 128 rows; the donor lies in boxes of 64 rows, and most of them are no business of a piece's."""
    shape, rows = (8192, 1024), 64
    fp8 = {"w": ("F8_E4M3", shape), "w_scale_inv": ("F32", (64, 8))}
    target = replace(described("/t", fp8), config=fp8_config())
    boxes = tuple(Box("/d", n * rows * 1024 * 2, (n * rows, 0), (rows, 1024)) for n in range(shape[0] // rows))
    donor = described("/d", {"w": ("BF16", shape)})
    donor = replace(donor, tensors={"w": donor.tensors["w"]._replace(source=Gathered("BF16", shape, boxes))})
    opened = {"t": target, "d": donor, "r": described("/r", {"w": ("BF16", shape)})}
    options = PlanOptions(requantize=True, piece_bytes=1 << 20)
    plan = make_plan(Recipe("transfer", "t", (Vector("d", "r"),), ((1.0,),)), opened, options)
    how = plan.tensors[0].requantized
    assert how == Requantized(8192, 1024, (128, 128), "F32", False, 1, "w_scale_inv", plan.shards[1].name, 4096)
    for piece in plan.pieces:
        (span,) = task_of(plan, piece).spans
        first, last = how.band(span.start)[0] // 1024, how.band(span.stop - 1)[1] // 1024
        (vector,) = span.vectors
        assert isinstance(vector.plus, Gathered)
        assert [box.starts[0] for box in vector.plus.boxes] == list(range(first, last, rows))


def test_bands_make_up_a_stack_of_matrices() -> None:
    how = Requantized(300, 7, (128, 128), "F32", False)
    borders = [0]
    while borders[-1] < 2 * 300 * 7:
        start, stop = how.band(borders[-1])
        assert start == borders[-1]
        assert {how.number(byte) for byte in range(start, stop)} == {len(borders) - 1}
        assert {how.band(byte) for byte in range(start, stop)} == {(start, stop)}
        borders.append(stop)
    assert [border // 7 for border in borders] == [0, 128, 256, 300, 428, 556, 600]
    assert (how.across, how.band_bytes) == (1, 128 * 7)
