"""Experts, gate and up, query, key and value: one tensor in some inputs and several in others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from reference import Raw, assert_same, combined, narrow, read_checkpoint, weights, widen
from refusal import ROLES, assert_refused, transfer
from triples import ALPHA, applied, ok, rows_of, transferred, write_models

import rv_distributed as rv

EXPERTS, HIDDEN, INNER = 5, 40, 24
HEADS, GROUPS, WIDTH = 4, 2, 10
CONFIG = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH}
Tensors = dict[str, Raw]
Layout = Callable[[Tensors], Tensors]


def split(seed: int, dtype: str = "BF16") -> Tensors:
    """One layer, every part a tensor of its own."""
    rng = np.random.default_rng(seed)
    shapes = {
        **{
            f"self_attn.{part}_proj.weight": (rows * WIDTH, HIDDEN) for part, rows in zip("qkv", (4, 2, 2), strict=True)
        },
        **{f"self_attn.{part}_proj.bias": (rows * WIDTH,) for part, rows in zip("qkv", (4, 2, 2), strict=True)},
        "mlp.gate.weight": (EXPERTS, HIDDEN),
        "mlp.shared_experts.gate_proj.weight": (INNER, HIDDEN),
        "mlp.shared_experts.up_proj.weight": (INNER, HIDDEN),
        "mlp.shared_experts.down_proj.weight": (HIDDEN, INNER),
    }
    for expert in range(EXPERTS):
        # As files have them: by their names, so that no two parts of a fused tensor lie side by side.
        shapes |= {
            f"mlp.experts.{expert}.down_proj.weight": (HIDDEN, INNER),
            f"mlp.experts.{expert}.gate_proj.weight": (INNER, HIDDEN),
            f"mlp.experts.{expert}.up_proj.weight": (INNER, HIDDEN),
        }
    return {f"model.layers.0.{name}": weights(rng, dtype, shape) for name, shape in shapes.items()}


def joined(tensors: Tensors, whole: str, parts: list[str], shape: tuple[int, ...]) -> Tensors:
    """``parts`` as one tensor ``whole``, at the first one's place."""
    dtype = tensors[parts[0]].dtype
    made = Raw(dtype, shape, b"".join(tensors[part].data for part in parts))
    renamed = {whole if name == parts[0] else name: raw for name, raw in tensors.items() if name not in parts[1:]}
    return {name: made if name == whole else raw for name, raw in renamed.items()}


def fused_experts(tensors: Tensors) -> Tensors:
    module = "model.layers.0.mlp.experts"
    inner = [f"{module}.{n}.{part}_proj.weight" for n in range(EXPERTS) for part in ("gate", "up")]
    tensors = joined(tensors, f"{module}.gate_up_proj", inner, (EXPERTS, 2 * INNER, HIDDEN))
    downs = [f"{module}.{n}.down_proj.weight" for n in range(EXPERTS)]
    return joined(tensors, f"{module}.down_proj", downs, (EXPERTS, HIDDEN, INNER))


def fused_linear(tensors: Tensors) -> Tensors:
    """As Phi-3 has them."""
    at, shared = "model.layers.0.self_attn", "model.layers.0.mlp.shared_experts"
    for kind, shape in (("weight", (80, HIDDEN)), ("bias", (80,))):
        tensors = joined(tensors, f"{at}.qkv_proj.{kind}", [f"{at}.{part}_proj.{kind}" for part in "qkv"], shape)
    parts = [f"{shared}.{part}_proj.weight" for part in ("gate", "up")]
    return joined(tensors, f"{shared}.gate_up_proj.weight", parts, (2 * INNER, HIDDEN))


def mixtral(tensors: Tensors) -> Tensors:
    """In Mixtral's older names."""
    older = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def name_of(name: str) -> str:
        if ".experts." in name:
            for newer, short in older.items():
                name = name.replace(newer, short)
        return name.replace(".mlp.", ".block_sparse_moe.") if "shared" not in name else name

    return {name_of(name): raw for name, raw in tensors.items()}


def wrapped(tensors: Tensors) -> Tensors:
    return {f"module.{name}": raw for name, raw in fused_experts(tensors).items()}


def everything(tensors: Tensors) -> Tensors:
    return fused_linear(fused_experts(tensors))


LAYOUTS: dict[str, Layout] = {
    "split": dict,
    "fused": fused_experts,
    "linear": fused_linear,
    "all": everything,
    "mixtral": mixtral,
    "wrapped": wrapped,
}


def models_of(folder: Path, layouts: tuple[str, ...], *, dtypes: tuple[str, ...] = ("BF16",) * 3) -> Path:
    tensors = {
        role: LAYOUTS[layout](split(seed, dtype))
        for seed, (role, layout, dtype) in enumerate(zip(ROLES, layouts, dtypes, strict=True))
    }
    return write_models(folder, tensors, configs=dict.fromkeys(ROLES, CONFIG), shards=3)


def wanted(layout: str, dtypes: tuple[str, ...] = ("BF16",) * 3) -> Tensors:
    """Computed part by part, and laid out as the target is."""
    t, a, b = (split(seed, dtype) for seed, dtype in enumerate(dtypes))
    return LAYOUTS[layout]({name: combined(raw, [(a[name], b[name])], [ALPHA]) for name, raw in t.items()})


COMBINATIONS = [
    ("split", "fused", "fused"),
    ("split", "fused", "split"),
    ("fused", "split", "split"),
    ("fused", "fused", "split"),
    ("split", "linear", "linear"),
    ("linear", "split", "linear"),
    ("all", "split", "fused"),
    ("split", "all", "split"),
    ("fused", "mixtral", "split"),
    ("mixtral", "fused", "mixtral"),
    ("mixtral", "split", "wrapped"),
    ("split", "wrapped", "all"),
    ("wrapped", "mixtral", "all"),
]


@pytest.mark.parametrize("layouts", COMBINATIONS, ids="-".join)
def test_every_layout_meets_every_other(tmp_path: Path, layouts: tuple[str, ...]) -> None:
    models = models_of(tmp_path, layouts)
    found, _ = transferred(models)
    assert_same(found, wanted(layouts[0]))
    manifest = json.loads((models / "out" / "rv_manifest.json").read_bytes())
    assert (manifest["left_out"], manifest["totals"]["copied"]) == ([], 0)


@pytest.mark.parametrize("layouts", [COMBINATIONS[0], COMBINATIONS[2], COMBINATIONS[6]], ids="-".join)
def test_a_vector_keeps_the_donor_s_layout_and_is_added_to_any(tmp_path: Path, layouts: tuple[str, ...]) -> None:
    models = models_of(tmp_path, layouts, dtypes=("BF16", "F32", "F16"))
    assert_same(applied(models), wanted(layouts[0], ("BF16", "F32", "F16")))
    assert list(read_checkpoint(models / "vector")) == list(read_checkpoint(models / "donor"))


def test_the_table_and_the_summary_say_how_parts_were_found(tmp_path: Path) -> None:
    models = models_of(tmp_path, ("fused", "split", "all"))
    _, said = transferred(models, "--include", "experts")
    rows = rows_of(models / "out")
    module = "model.layers.0.mlp.experts"
    assert rows[f"{module}.gate_up_proj"].matched == (
        f"donor: 10 tensors, {module}.0.gate_proj.weight to {module}.4.up_proj.weight"
    )
    assert rows["model.layers.0.mlp.shared_experts.up_proj.weight"].matched == (
        "reference: a part of model.layers.0.mlp.shared_experts.gate_up_proj.weight"
    )
    assert "  donor: model.layers.N.mlp.experts.down_proj as 5 tensors, " in said
    assert "and 1 more" in said
    args = transfer(models, models / "plan", "--dry-run", "--json", "--include", "experts")
    plan = json.loads(ok(*args).stdout)["plan"]
    assert {entry["tensor"] for entry in plan["matched"]} == {name for name, row in rows.items() if row.matched}
    assert len(plan["rules"]) == 4


def test_pieces_and_stochastic_bits_do_not_see_the_parts(tmp_path: Path) -> None:
    """The same target and the same sums, whether a source is one tensor or many; with parts across pieces' borders."""
    rng = np.random.default_rng(3)
    shapes = {f"experts.{n}.{part}.weight": (301, 257) for n in range(9) for part in ("gate_proj", "up_proj")}
    models = {}
    for role in ROLES:
        parts = {name: weights(rng, "BF16", shape) for name, shape in shapes.items()}
        models[role, "split"] = parts
        models[role, "fused"] = joined(parts, "experts.gate_up_proj", list(shapes), (9, 602, 257))
    outs = {}
    for sources in ("fused", "split"):
        kinds = dict(zip(ROLES, ("fused", sources, sources), strict=True))
        folder = write_models(tmp_path / sources, {role: models[role, kind] for role, kind in kinds.items()}, shards=2)
        inputs = [str(folder / role) for role in ROLES]
        for number, piece_bytes in enumerate((1 << 20, 64 << 20)):
            options = rv.PlanOptions(piece_bytes=piece_bytes, rounding="stochastic", seed=3)
            out = folder / f"out{number}"
            how = rv.RunOptions(runtime="local", workers=2)
            rv.transfer(inputs[0], inputs[1], inputs[2], str(out), alpha=0.3, plan_options=options, run_options=how)
            rv.verify(str(out))
            row = rows_of(out)["experts.gate_up_proj"]
            assert len(row.parts) == (3 if number == 0 else 1)
            outs[sources, number] = (read_checkpoint(out), row._replace(parts=(), digest="", matched=""))
    assert outs["split", 0][0] == outs["fused", 0][0] == outs["split", 1][0] == outs["fused", 1][0]
    # Sums are added up piece by piece along the same tree; within a block they may be cut where a source ends.
    assert outs["split", 0][1] == outs["split", 1][1]
    assert outs["fused", 0][1] == outs["fused", 1][1]
    assert outs["split", 0][1].v_norm == pytest.approx(outs["fused", 0][1].v_norm, rel=1e-14)


def test_a_run_of_many_parts_is_resumed(tmp_path: Path) -> None:
    models = models_of(tmp_path, ("fused", "split", "split"))
    vector = rv.Vector(str(models / "donor"), str(models / "reference"))
    recipe = rv.Recipe("transfer", str(models / "target"), (vector,), ((ALPHA,),))
    job = rv.prepare(recipe, [str(models / "out")], rv.PlanOptions(), rv.RunOptions(runtime="local"))

    class Stopped(Exception):
        pass

    def stop(progress: rv.Progress) -> None:
        if progress.pieces == progress.pieces_total:
            raise Stopped

    with pytest.raises(Stopped):
        job.run(stop)
    (manifest,) = job.run()
    assert manifest.timings.pieces_kept == len(job.plan.pieces)
    assert_same(read_checkpoint(models / "out"), wanted("fused"))


def test_experts_that_are_stored_transposed_are_refused(tmp_path: Path) -> None:
    """As in Llama 4 and GPT-OSS: [experts, inputs, outputs]."""
    models = models_of(tmp_path, ("split", "fused", "fused"))
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    for role in ("donor", "reference"):
        for name, raw in tensors[role].items():
            if len(raw.shape) == 3:
                shape = (raw.shape[0], raw.shape[2], raw.shape[1])
                tensors[role][name] = Raw(raw.dtype, shape, raw.data)
    again = write_models(tmp_path / "again", tensors)
    told = "is in another layout here, and of one of them the experts are stored transposed"
    done = assert_refused(again, transfer(again, again / "out"), (f"{again / 'donor'}: tensor ", told))
    assert "Convert one checkpoint to the other's layout first" in done.stderr
    # All three alike are no question of layout.
    tensors["target"] = tensors["donor"]
    alike = write_models(tmp_path / "alike", tensors)
    transferred(alike)


def test_transposed_experts_are_recognised_where_one_shape_alone_does_not_tell(tmp_path: Path) -> None:
    """With as many hidden units as gate and up rows, gate_up_proj is square: down_proj tells."""
    rng = np.random.default_rng(1)
    parts = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    target = {
        f"experts.{n}.{part}.weight": weights(rng, "F32", shape) for n in range(2) for part, shape in parts.items()
    }
    fused = {
        "experts.gate_up_proj": weights(rng, "F32", (2, 16, 16)),
        "experts.down_proj": weights(rng, "F32", (2, 8, 16)),
    }
    models = write_models(
        tmp_path, {"target": target, "donor": fused, "reference": fused | {"x": target["experts.0.up_proj.weight"]}}
    )
    told = "tensor 'experts.0.gate_proj.weight': is in another layout here, and of one of them the experts are stored"
    assert_refused(models, transfer(models, models / "out"), told)


def test_shared_experts_are_no_experts(tmp_path: Path) -> None:
    models = models_of(tmp_path, ("fused", "split", "split"))
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    for role in ("donor", "reference"):
        for expert in range(EXPERTS):
            del tensors[role][f"model.layers.0.mlp.experts.{expert}.down_proj.weight"]
            name = f"model.layers.0.mlp.shared_experts.{expert}.down_proj.weight"
            tensors[role][name] = weights(np.random.default_rng(expert), "BF16", (HIDDEN, INNER))
    again = write_models(tmp_path / "again", tensors)
    told = f"{again / 'target'}: has 1 tensor such as 'model.layers.0.mlp.experts.down_proj' that no vector has, and "
    assert_refused(again, transfer(again, again / "out"), (told, "has 5 tensors such as", "--missing copy"))


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    models = models_of(tmp_path, ("fused", "split", "split"))
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    del tensors["donor"]["model.layers.0.mlp.experts.3.up_proj.weight"]
    again = write_models(tmp_path / "again", tensors)
    told = (
        f"{again / 'donor'}: tensor 'model.layers.0.mlp.experts.gate_up_proj': is in several tensors here, "
        "but without 1 of 10, such as layers.0.mlp.experts.3.up_proj.weight"
    )
    assert_refused(again, transfer(again, again / "out"), told)


def test_parts_of_another_size_are_refused(tmp_path: Path) -> None:
    models = models_of(tmp_path, ("split", "fused", "split"))
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors["donor"][name] = weights(np.random.default_rng(0), "BF16", (EXPERTS, 2 * INNER + 2, HIDDEN))
    again = write_models(tmp_path / "again", tensors)
    told = "of model.layers.0.mlp.experts.gate_up_proj has shape [25, 40], but [24, 40] in the target"
    assert_refused(again, transfer(again, again / "out"), told)


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": 4, "hidden_size": 40}], ids=["unknown", "other sizes"])
def test_without_sizes_query_key_and_value_are_not_cut(tmp_path: Path, config: dict[str, int]) -> None:
    models = models_of(tmp_path, ("split", "linear", "linear"))
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    again = write_models(tmp_path / "again", tensors, configs=dict.fromkeys(ROLES, config))
    told = "such as 'model.layers.0.self_attn.q_proj.weight' that no vector has, and"
    done = assert_refused(again, transfer(again, again / "out"), told)
    assert "such as 'model.layers.0.self_attn.qkv_proj.weight' with no place here" in done.stderr


def test_a_header_with_countless_experts_is_not_taken_apart(tmp_path: Path) -> None:
    models = models_of(tmp_path, ("split", "fused", "fused"))
    tensors = {role: read_checkpoint(models / role) for role in ROLES}
    for role in ("donor", "reference"):
        tensors[role]["model.layers.0.mlp.experts.gate_up_proj"] = Raw("BF16", (1 << 60, 0, 40), b"")
    again = write_models(tmp_path / "again", tensors)
    assert_refused(again, transfer(again, again / "out"), "that no vector has, and")


def test_a_sum_of_models_takes_every_layout(tmp_path: Path) -> None:
    models = models_of(tmp_path, ("fused", "split", "wrapped"))
    vectors = tuple(rv.Vector(str(models / role)) for role in ROLES)
    recipe = rv.Recipe("linear", None, vectors, ((0.5, 0.25, 0.25),))
    rv.prepare(recipe, [str(models / "out")], rv.PlanOptions(), rv.RunOptions(runtime="local")).run()
    parts = [split(seed) for seed in range(3)]
    sums = {}
    for name, raw in parts[0].items():
        t, a, b = (widen(each[name]).astype(np.float64) for each in parts)
        # Exact in float32: alphas are powers of two, and the values are of like size.
        sums[name] = Raw("BF16", raw.shape, narrow((0.5 * t + 0.25 * a + 0.25 * b).astype(np.float32), "BF16"))
    found, expected = read_checkpoint(models / "out"), fused_experts(sums)
    assert found.keys() == expected.keys()
    for name, raw in expected.items():
        assert np.allclose(widen(found[name]), widen(raw), rtol=2**-7, atol=0)
    ok("verify", models / "out", "--against-inputs")
