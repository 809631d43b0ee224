"""NaN and infinity: counted wherever they come from, told with tensor, place and source, and not published unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference import Raw, read_checkpoint, weights, widen, write_checkpoint
from refusal import Done, run_rv

from rv_distributed.checkpoint.table import TensorRow, read_table

NAMES = ("target", "donor", "reference")
BITS = {"nan": 0x7FC1, "inf": 0x7F80, "-inf": 0xFF80}
#: ``big`` spans several blocks, and its borders lie inside elements' neighbourhoods: the header's size is odd.
COUNT = 700_001


def models(root: Path, spoil: Callable[[str, str, np.ndarray], None]) -> Path:
    """Three models; ``spoil(role, tensor, bits)`` may put anything into a tensor's bits."""
    for number, role in enumerate(NAMES):
        rng = np.random.default_rng(number)
        tensors: dict[str, Raw] = {}
        for name, shape in {"big": (COUNT,), "kept": (40, 30), "small": (7,)}.items():
            bits = np.frombuffer(weights(rng, "BF16", shape).data, np.uint16).copy()
            spoil(role, name, bits)
            tensors[name] = Raw("BF16", shape, bits.tobytes())
        tensors["step"] = Raw("I64", (1,), np.array([0x7FC0_7FC0_7FC0_7FC0], np.int64).tobytes())
        write_checkpoint(root / role, tensors, sidecars={"config.json": b"{}"})
    return root


def transfer(root: Path, *more: str) -> Done:
    inputs = [text for role in NAMES for text in (f"--{role}", str(root / role))]
    return run_rv("transfer", *inputs, "--out", root / "out", "--runtime", "local", "--exclude", "kept", *more)


def rows(out: Path) -> dict[str, TensorRow]:
    return {row.name: row for row in read_table((out / "rv_tensors.parquet").read_bytes())}


@pytest.mark.parametrize("value", BITS)
@pytest.mark.parametrize("role", NAMES)
def test_an_input_with_nan_or_infinity_is_named_and_the_finished_work_is_published_when_allowed(
    tmp_path: Path, role: str, value: str
) -> None:
    places = [270_000, 5, COUNT - 1]

    def spoil(one: str, tensor: str, bits: np.ndarray) -> None:
        if (one, tensor) == (role, "big"):
            bits[places] = BITS[value]

    root = models(tmp_path, spoil)
    refused = transfer(root)
    assert refused.status == 2
    assert (
        f"{root / role / 'model.safetensors'}: tensor 'big': 3 of {COUNT} elements are NaN or infinite"
        in refused.stderr
    )
    assert f"the first at index 5 (target {'' if role != 'target' else value}" in refused.stderr
    assert f"{role} {value}" in refused.stderr
    assert "--allow-nonfinite" in refused.stderr
    assert not (root / "out").exists()

    allowed = transfer(root, "--allow-nonfinite", "--json")
    assert allowed.status == 0
    manifest = json.loads(allowed.stdout)["outputs"][0]["manifest"]
    assert manifest["timings"]["pieces_kept"] == manifest["timings"]["pieces"] > 0
    assert manifest["totals"]["nan_elements"] + manifest["totals"]["infinite_elements"] == 3
    found = rows(root / "out")
    assert (found["big"].nan + found["big"].infinite, found["big"].first_nonfinite) == (3, 5)
    assert [
        (found[name].nan + found[name].infinite, found[name].first_nonfinite) for name in ("kept", "small", "step")
    ] == [(0, None)] * 3
    big = widen(read_checkpoint(root / "out")["big"])
    assert np.flatnonzero(~np.isfinite(big)).tolist() == sorted(places)
    assert run_rv("verify", root / "out").status == 0


def test_a_tensor_that_is_only_copied_is_looked_at_too(tmp_path: Path) -> None:
    def spoil(role: str, tensor: str, bits: np.ndarray) -> None:
        if tensor == "kept" and role in ("target", "donor"):
            bits[77 if role == "target" else 3] = BITS["nan"]

    refused = transfer(models(tmp_path, spoil))
    assert refused.status == 2
    assert f"{tmp_path / 'target' / 'model.safetensors'}: tensor 'kept': 1 of 1200 elements" in refused.stderr
    assert "the first at index 77 (target nan)" in refused.stderr


def test_what_does_not_reach_the_output_does_not_stop_it(tmp_path: Path) -> None:
    def spoil(role: str, tensor: str, bits: np.ndarray) -> None:
        if (role, tensor) == ("donor", "kept"):
            bits[:] = BITS["nan"]

    assert transfer(models(tmp_path, spoil)).status == 0
    assert rows(tmp_path / "out")["kept"].first_nonfinite is None


def test_a_sum_that_is_too_large_for_the_dtype_is_told_as_such(tmp_path: Path) -> None:
    def spoil(role: str, tensor: str, bits: np.ndarray) -> None:
        if tensor == "small":
            bits[2] = {"target": 0x7F00, "donor": 0x7F00, "reference": 0}[role]  # 2^127 each

    refused = transfer(models(tmp_path, spoil))
    assert refused.status == 2
    assert f"{tmp_path / 'out'}: tensor 'small': 1 of 7 elements" in refused.stderr
    assert "the sum is too large for BF16" in refused.stderr


def test_every_output_of_a_sweep_is_checked_before_any_is_published(tmp_path: Path) -> None:
    def spoil(role: str, tensor: str, bits: np.ndarray) -> None:
        if tensor == "small":
            bits[2] = {"target": 0x7F00, "donor": 0x7F00, "reference": 0}[role]

    root = models(tmp_path, spoil)
    inputs = [text for role in NAMES for text in (f"--{role}", str(root / role))]
    out = root / "out-{alpha}"
    assert run_rv("transfer", *inputs, "--out", out, "--runtime", "local", "--alpha", "0.5,1.0").status == 2
    assert not (root / "out-0.5").exists()
    assert not (root / "out-1.0").exists()


def test_many_bad_tensors_are_told_in_a_few_lines(tmp_path: Path) -> None:
    tensors = {f"t{n:03d}": Raw("BF16", (2,), np.array([BITS["nan"], 0], np.uint16).tobytes()) for n in range(200)}
    for role in NAMES:
        other = {name: Raw("BF16", (2,), np.array([1, len(role)], np.uint16).tobytes()) for name in tensors}
        write_checkpoint(tmp_path / role, tensors if role == "donor" else other, sidecars={"config.json": b"{}"})
    refused = transfer(tmp_path)
    assert refused.status == 2
    assert "180 more tensors have elements that are NaN or infinite" in refused.stderr
    assert len(refused.stderr.splitlines()) < 40
