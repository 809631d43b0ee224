"""PyTorch Distributed Checkpoint folders as inputs, against the whole tensors that they were made of."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_saver import placements
from reference import Raw, assert_same, combined, extracted, read_checkpoint, weights, write_checkpoint
from refusal import Done, run_rv
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.metadata import Metadata

import rv_distributed as rv

RANKS = 4
MESHES = [f"mesh{number}" for number in range(len(placements()))]
PLAN = rv.PlanOptions(piece_bytes=1 << 20, max_shard_bytes=1_500_000)
LOCAL = rv.RunOptions(runtime="local", workers=3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `distributed_saver` makes."""
    folder = tmp_path_factory.mktemp("saved")
    command = [sys.executable, str(Path(__file__).parent / "distributed_saver.py"), str(RANKS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def save(folder: Path, tensors: dict[str, Any]) -> Path:
    """In this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_saver.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder


def other(rng: np.random.Generator, like: dict[str, Raw]) -> dict[str, Raw]:
    return {name: weights(rng, raw.dtype, raw.shape, 1.0) for name, raw in like.items()}


def transfer(target: str | Path, donor: str | Path, reference: str | Path, out: Path, *more: str) -> Done:
    inputs = ["--target", target, "--donor", donor, "--reference", reference]
    return run_rv("transfer", *inputs, "--out", out, "--runtime", "local", *more)


def test_the_meshes_are_cut_as_they_should_be(saved: Path) -> None:
    """By rows, by columns, by both, unevenly; else the other tests would show nothing."""
    opened = [rv.open_checkpoint(saved / mesh) for mesh in MESHES]
    for checkpoint in opened:
        assert checkpoint.tensors["scalar"].source is None
        assert checkpoint.tensors["g"].source is not None
    boxes = {
        tuple((box.starts, box.sizes) for box in checkpoint.tensors["a"].source.boxes)  # type: ignore[union-attr]
        for checkpoint in opened
    }
    # The first two differ in who has which box.
    assert len(boxes) == len(MESHES) - 1
    assert (((0, 0), (150, 201)), ((0, 201), (150, 200)), ((150, 0), (150, 201)), ((150, 201), (150, 200))) in boxes


@pytest.mark.parametrize("mesh", MESHES[:2])
def test_shards_meet_other_names_and_layouts(saved: Path, tmp_path: Path, mesh: str) -> None:
    """What is one tensor in many parts there is two tensors here, and named otherwise."""
    (tmp_path / "rules").write_text("^a$ -> model.mlp.gate_up_proj.weight\n")
    rng, whole = np.random.default_rng(7), read_checkpoint(saved / "whole")
    names, half = [f"model.mlp.{part}_proj.weight" for part in ("gate", "up")], 2 * 150 * 401
    halves = {
        name: Raw("BF16", (150, 401), whole["a"].data[at : at + half])
        for name, at in zip(names, (0, half), strict=True)
    }
    target, reference = other(rng, halves), {f"module.{name}": raw for name, raw in other(rng, halves).items()}
    paths = [write_checkpoint(tmp_path / role, tensors) for role, tensors in (("t", target), ("b", reference))]
    out = tmp_path / "out"
    rules = f"--key-mapping={tmp_path / 'rules'}"
    done = transfer(paths[0], saved / mesh, paths[1], out, "--alpha=0.7", "--include=mlp", rules)
    assert done.status == 0, done.stderr
    wanted = {name: combined(raw, [(halves[name], reference[f"module.{name}"])], [0.7]) for name, raw in target.items()}
    assert_same(read_checkpoint(out), wanted)
    assert "   decoded  donor: 4 parts (2 tensors)" in done.stdout


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("role", ["target", "donor", "reference"])
def test_shards_of_every_kind_are_gathered_to_the_bit(saved: Path, tmp_path: Path, mesh: str, role: str) -> None:
    whole = read_checkpoint(saved / "whole")
    rng = np.random.default_rng(MESHES.index(mesh))
    models = {of: whole if of == role else other(rng, whole) for of in ("target", "donor", "reference")}
    paths = {of: str(saved / mesh) if of == role else write_checkpoint(tmp_path / of, models[of]) for of in models}
    out = tmp_path / "out"
    rv.transfer(
        paths["target"], paths["donor"], paths["reference"], str(out), alpha=0.5, plan_options=PLAN, run_options=LOCAL
    )
    names = rv.open_checkpoint(paths["target"]).tensors
    wanted = {}
    for name in names:
        t, a, b = (models[of][name] for of in ("target", "donor", "reference"))
        wanted[name] = t if t.dtype == "I64" else combined(t, [(a, b)], [0.5])
    assert_same(read_checkpoint(out), wanted)
    done = run_rv("verify", out, "--against-inputs")
    assert done.status == 0, done.stderr


def test_the_model_of_a_trainer_s_state_is_read_by_its_own_names(saved: Path, tmp_path: Path) -> None:
    """As FSDP2 shards it, with an optimizer beside it: only the model counts, under the names that it has itself."""
    whole = read_checkpoint(saved / "whole-fsdp")
    reference = other(np.random.default_rng(1), whole)
    write_checkpoint(tmp_path / "reference", reference)
    rv.extract(str(saved / "fsdp"), str(tmp_path / "reference"), str(tmp_path / "out"), plan_options=PLAN)
    found = read_checkpoint(tmp_path / "out")
    assert {name: found[name] for name in sorted(found)} == {
        name: extracted(whole[name], reference[name], "F32") for name in sorted(whole)
    }
    (warning,) = rv.open_checkpoint(saved / "fsdp").warnings
    assert "18 tensors of no model, such as app.optim.state." in warning


def test_inspect_says_what_it_is(saved: Path) -> None:
    done = run_rv("inspect", saved / "mesh0")
    assert "decoding  7 tensors in up to 4 parts, gathered" in done.stdout
    assert "__3_0.distcp" in done.stdout
    tensor = json.loads(run_rv("inspect", saved / "mesh0", "--json").stdout)["tensors"]["a"]
    assert (tensor["file"], tensor["stop"]) == (".metadata", 300 * 401 * 2)
    assert [(part["index"], part["shape"]) for part in tensor["parts"]][1] == ([0, 201], [150, 200])
    document = json.loads(run_rv("inspect", saved / "fsdp", "--json").stdout)
    assert document["bytes"] == sum(4 * math.prod(t["shape"]) for t in document["tensors"].values())
    assert sorted(document["tensors"]) == sorted(read_checkpoint(saved / "whole-fsdp"))


NESTED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], list[str]]] = {
    "flat, as torchtitan": (lambda model: {**model, "optimizer": {"state": model}}, ["a.weight", "b"]),
    "model": (lambda model: {"model": model, "lr_scheduler": {"last": torch.ones(1)}}, ["a.weight", "b"]),
    "state_dict": (lambda model: {"state_dict": model}, ["a.weight", "b"]),
    "app.model": (lambda model: {"app": {"model": model, "optim": model}}, ["a.weight", "b"]),
    "nothing known": (lambda model: {"policy": model}, ["policy.a.weight", "policy.b"]),
}


@pytest.mark.parametrize("case", NESTED)
def test_the_model_is_found_in_a_nested_state(tmp_path: Path, case: str) -> None:
    nest, names = NESTED[case]
    model = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    opened = rv.open_checkpoint(save(tmp_path / "saved", nest(model)))
    assert sorted(opened.tensors) == names
    tensor = opened.tensors[names[0]]
    assert tensor[:2] == ("F32", (2, 3))
    content = (tmp_path / "saved" / tensor.file).read_bytes()[tensor.start : tensor.stop]
    assert np.frombuffer(content, np.float32).tolist() == list(range(6))


def test_every_dtype_and_size_is_where_it_is_said_to_be(tmp_path: Path) -> None:
    """Also through what torch.save writes for FP8, and for tensors without elements or dimensions."""
    dtypes = {
        torch.float64: "F64",
        torch.int32: "I32",
        torch.bool: "BOOL",
        torch.uint8: "U8",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.uint16: "U16",
        torch.complex64: "C64",
    }
    tensors = {str(dtype): torch.arange(12).reshape(3, 4).to(dtype) for dtype in dtypes}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(7.5)}
    opened = rv.open_checkpoint(save(tmp_path / "saved", {"model": tensors}))
    for name, tensor in tensors.items():
        found = opened.tensors[name]
        assert found[:2] == (dtypes.get(tensor.dtype, "F32"), tuple(tensor.shape))
        content = (tmp_path / "saved" / found.file).read_bytes()[found.start : found.stop]
        wanted = b"" if tensor.numel() == 0 else tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content == wanted, name


def test_a_target_in_parts_keeps_its_integers(saved: Path, tmp_path: Path) -> None:
    """They are gathered as bytes."""
    whole = read_checkpoint(saved / "whole")
    write_checkpoint(tmp_path / "other", other(np.random.default_rng(3), whole))
    done = transfer(saved / "mesh1", tmp_path / "other", saved / "mesh0", tmp_path / "out", "--alpha", "0")
    assert done.status == 0, done.stderr
    assert f"{saved / 'mesh1'}: holds no config.json, so the output has none" in done.stderr
    assert "mesh0: holds no config.json" not in done.stderr
    found = read_checkpoint(tmp_path / "out")
    assert {name: found[name] for name in whole} == whole


def test_parts_are_compared_with_the_whole(saved: Path) -> None:
    for a, b in (("mesh0", "mesh1"), ("mesh0", "whole"), ("whole", "mesh1")):
        found = rv.diff(saved / a, saved / b)
        assert not found.unlike + found.only_in_a + found.only_in_b
        assert {tensor.name: tensor.sums.differing for tensor in found.tensors} == dict.fromkeys(
            rv.open_checkpoint(saved / "whole").tensors, 0
        )


def test_a_part_that_changes_during_the_run_is_found_out(saved: Path, tmp_path: Path) -> None:
    from rv_distributed.errors import ChangedError
    from rv_distributed.recipe import Recipe, Vector

    donor = Path(shutil.copytree(saved / "mesh0", tmp_path / "donor"))
    recipe = Recipe("transfer", str(saved / "whole"), (Vector(str(donor), str(saved / "whole")),), ((1.0,),))
    job = rv.prepare(recipe, [str(tmp_path / "out")], rv.PlanOptions(), LOCAL)
    os.utime(donor / "__2_0.distcp", (1, 1))
    with pytest.raises(ChangedError, match="__2_0"):
        job.run()


# What is read is hostile.


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Change the metadata of a folder."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 - our own
    changed = change(metadata)
    path.write_bytes(pickle.dumps(metadata if changed is None else changed))


def _set(metadata: Metadata, *, name: str, value: Any) -> None:
    setattr(metadata, name, value)


def small(folder: Path) -> Path:
    return save(folder, {"model": {"w": torch.arange(20.0).reshape(4, 5), "v": torch.ones(3)}})


def refusal(folder: Path, tmp_path: Path) -> str:
    """What is told of a folder; also when it is looked at."""
    if not (tmp_path / "target").exists():
        write_checkpoint(tmp_path / "target", {"w": Raw("F32", (4, 5), bytes(80))})
    done = transfer(tmp_path / "target", folder, tmp_path / "target", tmp_path / "out")
    assert (done.status, done.stdout) == (2, ""), done
    assert not (tmp_path / "out").exists()
    assert str(folder) in done.stderr
    inspected = run_rv("inspect", folder)
    assert inspected.status == 2
    assert "Traceback" not in done.stderr + inspected.stderr
    return done.stderr


def test_a_metadata_that_would_run_a_command_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    folder = small(tmp_path / "saved")
    evil: Any = Evil(tmp_path / "ran")
    for where in ("planner_data", "storage_data", "storage_meta", "version"):
        shutil.rmtree(folder)
        small(folder)
        edit(folder, partial(_set, name=where, value=evil))
        assert ".metadata: names posix.system, which is no part of such a file" in refusal(folder, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=0))
    assert ".metadata: names posix.system, which is no part of such a file" in refusal(folder, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x80\x04",
        b"not a pickle",
        b"\x80\x04]r\xff\xff\xff\x7f.",  # a place in the memory for which there is none
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a terabyte of zeros
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04cbuiltins\neval\n(X\x04\x00\x00\x001/0)tR.",
        b"\x80\x04}.",
        b"\x80\x04(ctorch\nSize\n]]tR.",
        pickle.dumps([{}] * 3),
    ],
    ids=lambda raw: repr(raw)[:20],
)
def test_a_metadata_that_is_none_is_refused(tmp_path: Path, raw: bytes) -> None:
    folder = small(tmp_path / "saved")
    (folder / ".metadata").write_bytes(raw)
    assert "Save the checkpoint again, or convert it" in refusal(folder, tmp_path)


def info_of(metadata: Metadata, name: str = "model.w") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def chunk_of(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["model.w"].chunks[0]  # type: ignore[union-attr]


def test_no_more_is_told_than_can_be_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", {f"w{n}": torch.ones(2) for n in range(50)})
    (folder / "__0_0.distcp").write_bytes(bytes((folder / "__0_0.distcp").stat().st_size))
    told = refusal(folder, tmp_path)
    assert "21 problems with the inputs" in told
    assert "has 30 more parts with such problems" in told


def doubled() -> tuple[Any, ...]:
    """In memory, hardly anything; printed, hashed or made a text, no end."""
    found: tuple[Any, ...] = ()
    for _ in range(99):
        found = (found, found)
    return found


LIES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "another file": (lambda m: setattr(info_of(m), "relative_path", "__9_0.distcp"), "which is missing"),
    "a file elsewhere": (lambda m: setattr(info_of(m), "relative_path", "../target/model.safetensors"), "is missing"),
    "a place behind the end": (lambda m: setattr(info_of(m), "offset", 1 << 40), "holds a part of it at 1099511627776"),
    "a place before the start": (lambda m: setattr(info_of(m), "offset", -1), "has a part whose place is none"),
    "a length": (lambda m: setattr(info_of(m), "length", 1 << 62), "holds a part of it at"),
    "no length": (lambda m: setattr(info_of(m), "length", 0), "is not what torch.save writes"),
    "another record": (
        lambda m: vars(info_of(m)).update(vars(info_of(m, "model.v"))),
        "holds 'F32' of shape (3,), not",
    ),
    "a transformation": (lambda m: setattr(info_of(m), "transform_descriptors", ["zstd"]), "such as compression"),
    "another shape": (
        lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size([5, 4])),
        "has parts that do not make up its shape, [5, 4]",
    ),
    "sizes that overflow": (
        lambda m: setattr(m.state_dict_metadata["model.w"], "size", torch.Size([1 << 40, 1 << 40])),
        "more elements than 64 bits can count",
    ),
    "a size below 0": (lambda m: setattr(chunk_of(m), "sizes", (-4, -5)), "has sizes that are none: (-4, -5)"),
    "sizes that double": (lambda m: setattr(chunk_of(m), "sizes", doubled()), "has sizes that are none: ((((("),
    "too many sizes": (lambda m: setattr(chunk_of(m), "sizes", (1,) * 65), "has sizes that are none: (1, 1,"),
    "a size of many bytes": (lambda m: setattr(chunk_of(m), "sizes", (4, 1 << 63)), "has sizes that are none: (4, 9"),
    "a path that doubles": (
        lambda m: m.planner_data.update({"model.w": ("model", doubled())}),
        "has a path in the nested state that is none",
    ),
    "a part beyond": (lambda m: setattr(chunk_of(m), "sizes", (4, 6)), "has parts that do not make up its shape"),
    "no parts": (lambda m: m.state_dict_metadata["model.w"].chunks.clear(), "has parts that do not make up its shape"),  # type: ignore[union-attr]
    "a part twice": (
        lambda m: m.state_dict_metadata["model.w"].chunks.append(chunk_of(m)),  # type: ignore[union-attr]
        "has parts that do not make up its shape",
    ),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata["model.w"].properties, "dtype", torch.bfloat16),  # type: ignore[union-attr]
        "holds 'F32' of shape (4, 5), not BF16 of shape [4, 5]",
    ),
    "a dtype of no use": (
        lambda m: setattr(m.state_dict_metadata["model.w"].properties, "dtype", torch.complex128),  # type: ignore[union-attr]
        "has the dtype complex128, which safetensors has not",
    ),
    "nothing saved": (lambda m: m.storage_data.clear(), "has a part that is saved nowhere"),
    "no tensors": (lambda m: m.state_dict_metadata.clear(), "holds no tensors of a model"),
    "two models": (
        lambda m: m.planner_data.update({"model.v": ("critic", "model", "v")}),
        "holds several models (",
    ),
    "numbers for names": (lambda m: m.state_dict_metadata.update({3: 4}), "is no metadata"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("lie", LIES)
def test_a_metadata_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    change, told = LIES[lie]
    folder = small(tmp_path / "saved")
    edit(folder, change)
    assert told in refusal(folder, tmp_path)


def record_of(folder: Path) -> tuple[Path, int, int]:
    """The file, the first byte and the length of the record of ``w``."""
    info = info_of(pickle.loads((folder / ".metadata").read_bytes()))  # noqa: S301 - our own
    return folder / info.relative_path, info.offset, info.length


@pytest.mark.parametrize("flipped", ["everything before the elements", "everything behind them"])
def test_no_damage_of_a_record_leads_outside_of_it(tmp_path: Path, flipped: str) -> None:
    """Each byte around the elements is changed: the record is refused, or has its elements in itself."""
    folder = small(tmp_path / "saved")
    path, offset, length = record_of(folder)
    whole = path.read_bytes()
    good = rv.open_checkpoint(folder).tensors["w"]
    places = range(offset, good.start) if "before" in flipped else range(good.stop, offset + length)
    refused = 0
    for place in places[::7]:
        for value in (0x00, 0x7F, 0xFF):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                found = rv.open_checkpoint(folder).tensors["w"]
            except rv.InputError as error:
                refused += str(folder) in str(error)
            else:
                assert offset <= found.start < found.stop <= offset + length
    assert refused > 10


def test_a_transposed_tensor_is_refused_not_misread(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", {"w": torch.arange(20.0).reshape(5, 4).t(), "v": torch.ones(3)})
    assert "is not contiguous: its strides are (1, 4)" in refusal(folder, tmp_path)


FOREIGN: dict[str, tuple[list[str], str, str]] = {
    "verl": (
        ["actor/model_world_size_8_rank_0.pt", "actor/optim_world_size_8_rank_0.pt", "actor/huggingface/config.json"],
        "verl's files of FSDP ranks (actor/model_world_size_8_rank_0.pt)",
        "python -m verl.model_merger merge --backend fsdp --local_dir {folder} --target_dir OUT",
    ),
    "Megatron": (
        ["latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00_000/model_optim_rng.pt"],
        "a Megatron checkpoint",
        "AutoBridge.export_ckpt",
    ),
    "Megatron distributed": ([".metadata", "__0_0.distcp", "common.pt", "metadata.json"], "a Megatron", "AutoBridge"),
    "DeepSpeed": (
        ["global_step5/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"],
        "a DeepSpeed checkpoint",
        "python zero_to_fp32.py {folder} OUT --safe_serialization",
    ),
    "DeepSpeed ZeRO 3": (
        ["global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"],
        "a DeepSpeed checkpoint",
        "zero_to_fp32.py",
    ),
    "one folder up": (
        ["pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "trainer_state.json"],
        "a distributed checkpoint in a folder of its own",
        "Give that folder: {folder}/pytorch_model_fsdp_0.",
    ),
    "without metadata": (["__0_0.distcp"], "parts of a distributed checkpoint without its .metadata", "Copy the whole"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_other_frameworks_folders_are_refused_with_their_converter(tmp_path: Path, case: str) -> None:
    files, kind, remedy = FOREIGN[case]
    folder = tmp_path / "saved"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"?")
    told = refusal(folder, tmp_path)
    assert f"{folder}: holds {kind}" in told
    assert remedy.format(folder=folder) in told


def test_their_files_beside_a_model_are_left_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {"w": Raw("F32", (2,), bytes(8))})
    for name in ("latest", "zero_to_fp32.py", ".metadata"):
        (tmp_path / "model" / name).write_bytes(b"?")
    assert list(rv.open_checkpoint(tmp_path / "model").tensors) == ["w"]
