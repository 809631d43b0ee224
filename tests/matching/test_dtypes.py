"""Every tensor in its own dtype: mixtures of all that can be computed with, and bytes that cannot."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Raw, assert_same, combined, read_checkpoint, weights
from refusal import ROLES, assert_refused, run_rv, transfer
from rounding_reference import doubles, nearest, stochastic
from triples import ALPHA, applied, ok, rows_of, transferred, write_models

COUNT = 1001
DTYPES = ("F32", "BF16", "F16", "F64")
#: One element, of dtypes with fewer than 8 bits several, of every dtype that is not computed with.
UNUSUAL = {
    "F8_E4M3": Raw("F8_E4M3", (2, 3), b"\x38\x7f\xff\x00\x80\x01"),
    "F8_E5M2": Raw("F8_E5M2", (2, 3), b"\x3c\x7c\xff\x00\x80\x01"),
    "F8_E8M0": Raw("F8_E8M0", (3,), b"\x7f\xff\x00"),
    "F8_E4M3FNUZ": Raw("F8_E4M3FNUZ", (3,), b"\x38\x80\x01"),
    "F8_E5M2FNUZ": Raw("F8_E5M2FNUZ", (3,), b"\x38\x80\x01"),
    "F4": Raw("F4", (3, 2), b"\x12\x34\xff"),
    "F6_E2M3": Raw("F6_E2M3", (4,), b"\x12\x34\xff"),
    "F6_E3M2": Raw("F6_E3M2", (2, 4), b"\x12\x34\xff\x56\x78\x9a"),
    "C64": Raw("C64", (2,), bytes(range(16))),
}
WHOLE = {
    "BOOL": Raw("BOOL", (5,), b"\0\1\1\0\1"),
    "U8": Raw("U8", (3,), b"\0\xff\x7f"),
    "I8": Raw("I8", (3,), b"\0\xff\x7f"),
    "I16": Raw("I16", (2,), b"\0\xff\x7f\0"),
    "U16": Raw("U16", (2,), b"\0\xff\x7f\0"),
    "I32": Raw("I32", (1,), b"\xff\xff\xff\x7f"),
    "U32": Raw("U32", (1,), b"\xff\xff\xff\x7f"),
    "I64": Raw("I64", (), b"\xff" * 7 + b"\x7f"),
    "U64": Raw("U64", (1,), b"\xff" * 8),
}


def random_raw(rng: np.random.Generator, dtype: str, count: int = COUNT) -> Raw:
    if dtype == "F64":
        return Raw("F64", (count,), (rng.standard_normal(count) * 0.05).tobytes())
    return weights(rng, dtype, (count,))


def computed(t: Raw, a: Raw, b: Raw, alpha: float, dtype: str | None = None) -> Raw:
    """In float64 where one of the three has it, else in float32."""
    dtype = dtype or t.dtype
    if "F64" not in (t.dtype, a.dtype, b.dtype):
        return combined(t, [(a, b)], [alpha], dtype)
    acc = doubles(t) + float(np.float32(alpha)) * (doubles(a) - doubles(b))
    return Raw(dtype, t.shape, acc.tobytes() if dtype == "F64" else nearest(acc, dtype))


def mixtures(folder: Path) -> Path:
    """A tensor for every mixture of three dtypes."""
    rng = np.random.default_rng(17)
    names = {f"{'-'.join(dtypes)}.weight": dtypes for dtypes in product(DTYPES, repeat=3)}
    tensors = {
        role: {name: random_raw(rng, dtypes[number]) for name, dtypes in names.items()}
        for number, role in enumerate(ROLES)
    }
    return write_models(folder, tensors)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixtures(tmp_path_factory.mktemp("mixtures"))


def wanted(models: Path, dtype: str | None = None) -> dict[str, Raw]:
    t, a, b = (read_checkpoint(models / role) for role in ROLES)
    return {
        name: computed(raw, a[name], b[name], ALPHA, dtype if raw.dtype != "F64" else None) for name, raw in t.items()
    }


def test_every_mixture_is_computed_in_its_own_precision(models: Path) -> None:
    found, said = transferred(models)
    assert_same(found, wanted(models))
    assert "64 computed" in said
    assert "    dtypes  " in said
    dtypes = {name: row.input_dtypes for name, row in rows_of(models / "out").items()}
    assert dtypes["F16-F32-BF16.weight"] == "donor: F32; reference: BF16"
    assert dtypes["BF16-F64-F64.weight"] == "donor, reference: F64"
    assert dtypes["F32-F32-F32.weight"] == ""


@pytest.mark.parametrize(("option", "dtype"), [("bfloat16", "BF16"), ("float32", "F32")])
def test_another_dtype_is_that_of_all_but_float64(models: Path, option: str, dtype: str) -> None:
    out = models / option
    ok(*transfer(models, out, f"--alpha={ALPHA}", "--dtype", option))
    assert_same(read_checkpoint(out), wanted(models, dtype))


def test_a_vector_of_float64_is_stored_and_added_as_such(models: Path) -> None:
    """What is float32 in a vector has been rounded to it, as everywhere."""
    found = applied(models)
    vector = read_checkpoint(models / "vector")
    t, a, b = (read_checkpoint(models / role) for role in ROLES)
    for name, raw in vector.items():
        wide = "F64" in (a[name].dtype, b[name].dtype)
        exact = doubles(a[name]) - doubles(b[name])
        assert raw.dtype == ("F64" if a[name].dtype == "F64" else "F32")
        assert raw.data == (exact.tobytes() if raw.dtype == "F64" else nearest(exact, "F32") if wide else raw.data)
        assert_same({name: found[name]}, {name: computed(t[name], raw, zero(raw), ALPHA)})


def zero(like: Raw) -> Raw:
    return Raw(like.dtype, like.shape, bytes(len(like.data)))


def test_a_sweep_and_random_rounding_take_float64_along(models: Path) -> None:
    name = "BF16-F64-BF16.weight"
    options = ("--alpha", "0,0.3,1", "--rounding", "stochastic", "--seed", "9", "--include", name.replace(".", r"\."))
    ok(*transfer(models, models / "sweep-{alpha}", *options))
    t, a, b = (read_checkpoint(models / role)[name] for role in ROLES)
    for alpha in ("0", "0.3", "1"):
        acc = doubles(t) + float(np.float32(float(alpha))) * (doubles(a) - doubles(b))
        expected = t.data if alpha == "0" else stochastic(acc, "BF16", seed=9, name=name)
        assert read_checkpoint(models / f"sweep-{alpha}")[name].data == expected


def test_float64_is_measured_in_float64(models: Path) -> None:
    out = models / "measured"
    ok(*transfer(models, out, f"--alpha={ALPHA}"))
    row = rows_of(out)["F64-F64-F64.weight"]
    t, a, b = (doubles(read_checkpoint(models / role)[row.name]) for role in ROLES)
    o = doubles(read_checkpoint(out)[row.name])
    v = a - b
    assert row.v_norm == pytest.approx(np.linalg.norm(v), rel=1e-14)
    assert row.t_norm == pytest.approx(np.linalg.norm(t), rel=1e-14)
    assert row.realised_alpha == pytest.approx(np.dot(o - t, v) / np.dot(v, v), rel=1e-12)
    assert row.nonzero == np.count_nonzero(v)
    assert row.changed == np.count_nonzero(o != t)
    assert row.ulps is not None
    assert sum(row.ulps) == row.changed


@pytest.mark.parametrize(
    ("before", "vector", "steps"),
    [
        (1.0, 2.0**-52, 1),
        (-1.0, -(2.0**-52) * 300, 300),
        (0.0, 5e-324, 1),
        (-5e-324, 1e-323, 2),
        (-1e300, 2e300, (1 << 63) - 1),
        (1e300, -2e300, (1 << 63) - 1),
    ],
)
def test_steps_of_64_bits_are_counted_as_far_as_they_can_be(
    tmp_path: Path, before: float, vector: float, steps: int
) -> None:
    values = {"target": before, "donor": vector, "reference": 0.0}
    tensors = {role: {"x": Raw("F64", (1,), np.float64(value).tobytes())} for role, value in values.items()}
    models = write_models(tmp_path, tensors, shards=1)
    ok(*transfer(models, models / "out"))
    assert rows_of(models / "out")["x"].ulps_max == steps


def test_nan_of_float64_is_found_and_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tensors = {role: {"x": random_raw(rng, "F64", 70_001), "y": random_raw(rng, "F32")} for role in ROLES}
    spoilt = doubles(tensors["donor"]["x"]).copy()
    spoilt[69_000] = np.inf
    tensors["donor"]["x"] = Raw("F64", (70_001,), spoilt.tobytes())
    models = write_models(tmp_path, tensors, shards=1)
    done = run_rv(*transfer(models, models / "out"))
    assert done.status == 2
    assert "tensor 'x': 1 of 70001 elements are NaN or infinite" in done.stderr
    assert "the first at index 69000" in done.stderr
    assert "donor inf" in done.stderr


def test_integers_and_booleans_stay_the_target_s(tmp_path: Path) -> None:
    others = {name: Raw(raw.dtype, raw.shape, bytes(len(raw.data))) for name, raw in WHOLE.items()}
    norm = {role: {"norm": weights(np.random.default_rng(n), "F32", (9,))} for n, role in enumerate(ROLES)}
    tensors = {role: (WHOLE if role == "target" else others) | norm[role] for role in ROLES}
    models = write_models(tmp_path, tensors)
    found, said = transferred(models)
    assert {name: found[name] for name in WHOLE} == WHOLE
    assert "1 computed, 9 copied (1 BOOL is not a floating-point dtype" in said


def test_unusual_dtypes_are_inspected_and_copied(tmp_path: Path) -> None:
    norm = {role: {"norm": weights(np.random.default_rng(n), "F32", (9,))} for n, role in enumerate(ROLES)}
    tensors = {role: norm[role] | (UNUSUAL if role == "target" else {}) for role in ROLES}
    models = write_models(tmp_path, tensors)
    found, said = transferred(models)
    assert {name: found[name] for name in UNUSUAL} == UNUSUAL
    assert f"1 computed, {len(UNUSUAL)} copied ({len(UNUSUAL)} not in any vector)" in said
    document: dict[str, Any] = json.loads(run_rv("inspect", models / "target", "--json").stdout)
    assert {name: entry["dtype"] for name, entry in document["tensors"].items() if name in UNUSUAL} == {
        name: name for name in UNUSUAL
    }
    assert all(name in run_rv("inspect", models / "target").stdout for name in UNUSUAL)


@pytest.mark.parametrize("dtype", UNUSUAL)
def test_unusual_dtypes_are_refused_where_they_were_to_be_computed_with(tmp_path: Path, dtype: str) -> None:
    norm = {role: {"norm": weights(np.random.default_rng(n), "F32", (9,))} for n, role in enumerate(ROLES)}
    models = write_models(tmp_path, {role: norm[role] | {"odd": UNUSUAL[dtype]} for role in ROLES})
    told = f"{models / 'target'}: tensor 'odd': is {dtype}; arithmetic is done on F32, BF16, F16, F64. "
    assert_refused(models, transfer(models, models / "out"), (told, "--exclude"))
    found, _ = transferred(models, "--exclude", "odd")
    assert found["odd"] == UNUSUAL[dtype]
    # In another input than the target it is refused too, by that input's name.
    wide = {
        role: norm[role] | {"odd": weights(np.random.default_rng(1), "F32", UNUSUAL[dtype].shape)} for role in ROLES
    }
    wide["reference"]["odd"] = UNUSUAL[dtype]
    other = write_models(tmp_path / "other", wide)
    assert_refused(other, transfer(other, other / "out"), f"{other / 'reference'}: tensor 'odd': is {dtype}; ")


@pytest.mark.gpu
def test_cuda_gives_the_bytes_of_the_cpu_in_every_mixture(models: Path) -> None:
    for device in ("cpu", "cuda"):
        ok(*transfer(models, models / device, f"--alpha={ALPHA}", "--device", device))
    assert_same(read_checkpoint(models / "cuda"), read_checkpoint(models / "cpu"))
