"""Weights in other formats, and quantized ones: refused, each with the converter that it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reference import Raw, write_checkpoint
from refusal import CONFIG, INDEX, ONE, TWO, assert_refused, make_models, one_tensor, run_rv, transfer

SAVE = "transformers' from_pretrained and save_pretrained write safetensors."
FILES = {
    "pytorch_model.bin": ("pickled PyTorch weights", SAVE),
    "consolidated.00.pth": ("pickled PyTorch weights", SAVE),
    "model.pt": ("pickled PyTorch weights", SAVE),
    "last.ckpt": ("pickled PyTorch weights", SAVE),
    "weights.pkl": ("pickled PyTorch weights", SAVE),
    "model-Q4_K_M.gguf": ("GGUF weights", "from_pretrained(FOLDER, gguf_file=NAME)"),
    "tf_model.h5": ("weights in another format", "from_tf or from_flax"),
    "flax_model.msgpack": ("weights in another format", "from_tf or from_flax"),
}
#: What unpickling would run: it makes a file called ``ran``.
PICKLE = b"cposix\nsystem\n(S'touch ran'\ntR."


@pytest.mark.parametrize("name", FILES)
def test_another_format_is_refused_naming_its_converter(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = make_models(tmp_path / "models")
    for file in (ONE, TWO, INDEX):
        (models / "donor" / file).unlink()
    (models / "donor" / name).write_bytes(PICKLE)
    kind, remedy = FILES[name]
    what = f"{models / 'donor'}: holds {kind} ({name}) and no safetensors files. "
    assert_refused(models, transfer(models, models / "out"), (what, remedy))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_beside_the_shards_is_neither_read_nor_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models = make_models(tmp_path / "models")
    for name in FILES:
        (models / "target" / name).write_bytes(PICKLE)
    assert run_rv(*transfer(models, models / "out")).status == 0
    assert not FILES.keys() & {path.name for path in (models / "out").iterdir()}
    assert not (tmp_path / "ran").exists()


GPTQMODEL = "dequantize it with GPTQModel (gptqmodel.utils.model_dequant.dequantize_model)."
STATED: dict[str, tuple[dict[str, Any], str, str]] = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, "'gptq'", GPTQMODEL),
    "AWQ": ({"quant_method": "awq", "bits": 4}, "'awq'", GPTQMODEL),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'", "model.dequantize()"),
    "bitsandbytes of old": ({"load_in_4bit": True}, "'bitsandbytes'", "model.dequantize()"),
    "FP8": ({"quant_method": "fp8", "fmt": "e5m2"}, "'fp8'", "FineGrainedFP8Config(dequantize=True)"),
    "MXFP4": ({"quant_method": "mxfp4"}, "'mxfp4'", "Mxfp4Config(dequantize=True)"),
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, "'compressed-tensors'", "run_compressed=False"),
}


@pytest.mark.parametrize("role", ["target", "donor"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "in text_config"])
@pytest.mark.parametrize("method", STATED)
def test_a_config_of_quantized_weights_is_refused_naming_the_converter(
    tmp_path: Path, method: str, nested: bool, role: str
) -> None:
    stated, name, remedy = STATED[method]
    models = make_models(tmp_path)
    config = models / role / "config.json"
    quantized = {"quantization_config": stated}
    config.write_text(json.dumps({**json.loads(CONFIG), **({"text_config": quantized} if nested else quantized)}))
    what = f"{config}: says that the weights are quantized: its quant_method is {name}. "
    give = "Give the model that it was made from, or "
    assert_refused(models, transfer(models, models / "out"), (what, give, remedy))


TENSORS = {
    "layers.0.up.qweight": ("I32", "gptq or awq", GPTQMODEL),
    "layers.0.up.SCB": ("F32", "bitsandbytes", "model.dequantize()"),
    "layers.0.up.weight.absmax": ("U8", "bitsandbytes", "model.dequantize()"),
    "layers.0.up.weight_scale_inv": ("F32", "fp8", "FineGrainedFP8Config"),
    "layers.0.up.weight_packed": ("I32", "compressed-tensors", "run_compressed=False"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_quantized_weights_are_refused_by_name_without_a_config(tmp_path: Path, name: str) -> None:
    dtype, method, remedy = TENSORS[name]
    for role in ("target", "donor", "reference"):
        norm = Raw("BF16", (8,), b"\x80\x3f" * 8)
        item = {"I32": 4, "F32": 4, "U8": 1}[dtype]
        tensors = {
            "norm": norm,
            "layers.0.up.weight": Raw("I8", (8,), bytes(8)),
            name: Raw(dtype, (8,), bytes(8 * item)),
        }
        write_checkpoint(tmp_path / role, tensors)
    what = f": tensor {name!r}: belongs to quantized weights ({method}). "
    told = [(f"{tmp_path / role}{what}", remedy) for role in ("target", "donor", "reference")]
    assert_refused(tmp_path, transfer(tmp_path, tmp_path / "out"), *told)


def test_fp8_weights_are_refused_by_name_and_may_be_left_out(tmp_path: Path) -> None:
    for number, role in enumerate(("target", "donor", "reference")):
        tensors = {"up": Raw("F8_E4M3", (8,), bytes(8)), "norm": Raw("BF16", (8,), bytes([number, 0x3F]) * 8)}
        write_checkpoint(tmp_path / role, tensors)
    what = "tensor 'up': is F8_E4M3; arithmetic is done on F32, BF16, F16, F64. Convert the checkpoint first, or leave"
    assert_refused(tmp_path, transfer(tmp_path, tmp_path / "out"), f"{tmp_path / 'target'}: {what}")
    assert run_rv(*transfer(tmp_path, tmp_path / "out", "--exclude", "up")).status == 0


def test_a_method_that_stores_ordinary_weights_is_accepted(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    for role in ("target", "donor", "reference"):
        online = {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}}
        (models / role / "config.json").write_text(json.dumps({**json.loads(CONFIG), **online}))
    assert run_rv(*transfer(models, models / "out", "--dry-run")).status == 0


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    args: list[str | Path] = [
        "extract",
        "--donor",
        models / "donor" / ONE,
        "--reference",
        models / "reference",
        "--out",
        models / "out",
    ]
    told = f"{models / 'donor' / ONE}: is a file, not a folder. Give the folder of a checkpoint."
    assert_refused(models, args, told)


def test_quantized_weights_that_no_vector_touches_are_copied(tmp_path: Path) -> None:
    quantized = json.dumps({"quantization_config": {"quant_method": "gptq"}}).encode()
    for role in ("target", "donor", "reference"):
        one_tensor(tmp_path / role, config_json=quantized)
    assert run_rv(*transfer(tmp_path, tmp_path / "out", "--alpha", "0")).status == 0
