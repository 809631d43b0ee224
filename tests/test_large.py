"""Checkpoints with the names and shapes of Qwen2.5-0.5B, by the command line, in both runtimes."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from reference import TIMED, Raw, combined, extracted, narrow, widen

from rv_distributed.demo import make_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, VOCABULARY = 896, 4864, 24, 14, 2, 151936
KV = HIDDEN // HEADS * KV_HEADS
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}
#: Role and number of its files, which are cut at other tensors in each.
ROLES = {"target": 1, "reference": 3, "donor": 5}
ALPHA = 0.7
BLOCK = 4 << 20
RUN = [sys.executable, "-c", "from rv_distributed.cli import main; main()"]
ENVIRONMENT = {**os.environ, "RAY_AUTH_MODE": "disabled"}
#: A small process between this one and the command: what a child inherits from a large parent counts as its peak.
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def shapes() -> dict[str, tuple[int, ...]]:
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "mlp.down_proj.weight": (HIDDEN, MLP),
        "mlp.gate_proj.weight": (MLP, HIDDEN),
        "mlp.up_proj.weight": (MLP, HIDDEN),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.k_proj.bias": (KV,),
        "self_attn.k_proj.weight": (KV, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.v_proj.bias": (KV,),
        "self_attn.v_proj.weight": (KV, HIDDEN),
    }
    layers = {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in block.items()}
    return {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), **layers, "model.norm.weight": (HIDDEN,)}


class Mapped(NamedTuple):
    """A tensor in a file, of which only what is looked at is read."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]

    def block(self, start: int, stop: int) -> Raw:
        """The elements from ``start`` to ``stop``."""
        size = {"BF16": 2, "F32": 4}[self.dtype]
        data = self.data[start * size : stop * size].tobytes()
        return Raw(self.dtype, (len(data) // size,), data)


def prepare_files(folder: Path, shards: int) -> dict[str, Mapped]:
    """The headers and the index of a checkpoint, and its tensors, still zero."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    names, weight_map = list(shapes()), {}
    tensors: dict[str, Mapped] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        header, end = {}, 0
        for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]:
            start, end = end, end + 2 * int(np.prod(shapes()[name]))
            header[name] = {"dtype": "BF16", "shape": shapes()[name], "data_offsets": [start, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + end)
        tensors |= mapped_file(folder / file, "r+")
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def mapped_file(path: Path, mode: str) -> dict[str, Mapped]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    content = np.memmap(path, np.uint8, mode)[8 + length :]  # type: ignore[call-overload]
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: Mapped(e["dtype"], tuple(e["shape"]), content[slice(*e["data_offsets"])]) for name, e in entries}


def mapped(folder: Path) -> dict[str, Mapped]:
    files = [mapped_file(path, "r") for path in sorted(folder.glob("*.safetensors"))]
    return {name: item for file in files for name, item in file.items()}


def rv_command(*arguments: str) -> None:
    done = subprocess.run([*RUN, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)


def inputs(root: Path, *roles: str) -> list[str]:
    return [text for role in roles for text in (f"--{role}", str(root / role))]


def peak_bytes(arguments: Sequence[str]) -> int:
    command = [sys.executable, "-c", MEASURE, *RUN, *arguments]
    return int(subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, check=True).stdout)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Target, reference and donor; the folder is removed afterwards, for it grows to 15 GB."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(71)
    files = {role: prepare_files(root / role, count) for role, count in ROLES.items()}
    for name, shape in shapes().items():
        count = int(np.prod(shape))
        for start in range(0, count, BLOCK):
            stop = min(count, start + BLOCK)
            values = np.ones(stop - start, np.float32) if len(shape) == 1 else np.zeros(stop - start, np.float32)
            for role, scale in (("target", 0.02), ("reference", 2e-4), ("donor", 1e-3)):
                noise = rng.standard_normal(stop - start, np.float32) * np.float32(scale)
                data = narrow(values + noise, "BF16")
                files[role][name].data[2 * start : 2 * stop] = np.frombuffer(data, np.uint8)
                values = widen(Raw("BF16", (), data))
    del files
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def outputs(models: Path) -> Path:
    """Where ``vector``, ``applied`` and ``transferred`` of both runtimes are, one folder for each runtime."""
    for runtime in ("local", "ray"):
        place = models / runtime
        place.mkdir()
        how = ["--runtime", runtime, "--max-shard-size", "300MB", "--quiet"]
        alpha = ["--alpha", str(ALPHA)]
        target, pair = inputs(models, "target"), inputs(models, "donor", "reference")
        vector = ["--vector", str(models / "local" / "vector")]
        rv_command("extract", *pair, "--out", str(place / "vector"), *how)
        rv_command("apply", *target, *vector, *alpha, "--out", str(place / "applied"), *how)
        rv_command("transfer", *target, *pair, *alpha, "--out", str(place / "transferred"), *how)
    return models


@pytest.mark.parametrize("operation", ["vector", "applied", "transferred"])
def test_outputs_have_the_reference_bits(outputs: Path, operation: str) -> None:
    t, a, b = (mapped(outputs / role) for role in ("target", "donor", "reference"))
    found = mapped(outputs / "local" / operation)
    assert list(found) == list(shapes())
    assert len(list((outputs / "local" / operation).glob("*.safetensors"))) > 2
    for name, item in found.items():
        dtype = "F32" if operation == "vector" else "BF16"
        assert (item.dtype, item.shape) == (dtype, shapes()[name]), name
        for start in range(0, int(np.prod(item.shape)), BLOCK):
            x, y, z, o = (tensor.block(start, start + BLOCK) for tensor in (t[name], a[name], b[name], item))
            wanted = extracted(y, z, "F32") if operation == "vector" else combined(x, [(y, z)], [ALPHA])
            assert o == wanted, (name, start)


@pytest.mark.parametrize("operation", ["vector", "applied", "transferred"])
def test_both_runtimes_make_the_same_folder(outputs: Path, operation: str) -> None:
    one, other = (outputs / runtime / operation for runtime in ("local", "ray"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    names = [name for name in names if name not in TIMED]
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("runtime", ["local", "ray"])
@pytest.mark.parametrize("operation", ["vector", "applied", "transferred"])
def test_verify_passes(outputs: Path, operation: str, runtime: str) -> None:
    rv_command("verify", str(outputs / runtime / operation))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_transformers_loads_the_result(outputs: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = outputs / "ray" / "transferred"
    model, info = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    parameters = dict(model.named_parameters())
    assert parameters.keys() == shapes().keys()
    for name, item in mapped(out).items():
        assert parameters[name].detach().view(torch.uint8).numpy().tobytes() == item.data.tobytes(), name
    with torch.no_grad():
        logits = model.eval()(torch.arange(8)[None]).logits
    assert logits.shape == (1, 8, VOCABULARY)
    assert torch.isfinite(logits).all()


def test_peak_memory_does_not_grow_with_the_model(models: Path, tmp_path: Path) -> None:
    make_checkpoints(str(tmp_path))
    peaks = []
    for root in (tmp_path, models):
        how = ["--alpha", str(ALPHA), "--runtime", "local", "--quiet", "--out", str(root / "measured")]
        peaks.append(peak_bytes(["transfer", *inputs(root, "target", "donor", "reference"), *how]))
    print("peak resident bytes, demo and 0.5B:", peaks)
    assert max(peaks) < 800_000_000, peaks
    assert peaks[1] <= 1.2 * peaks[0], peaks
