"""Three small checkpoints, what a transfer makes of them on local folders, and how to run it elsewhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

from servers.hub import TOKEN, Hub
from servers.stores import StoreServer

from rv_distributed.checkpoint.manifest import MANIFEST_FILE
from rv_distributed.storage import open_folder, open_store

NUMBERS = itertools.count()
ROLES = ("target", "donor", "reference")
CONFIG = b'{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 16}'
#: Of a few megabytes each, in shards that take several parts, and small ones.
SHAPES = {"embed": (3000, 1000), "layers.1.up": (1, 1), "layers.0.up": (5000, 2001), "norm": (1003,)}
OPTIONS = ("--max-shard-size", "21MB", "--runtime", "local")


def roles(folder: Path | str, options: str = "") -> list[str]:
    return [text for role in ROLES for text in (f"--{role}", f"{folder}/{role}{options}")]


def s3_roles(server: StoreServer, folder: str, port: int | None = None) -> list[str]:
    return [text for role in ROLES for text in (f"--{role}", server.uri(f"{folder}/{role}", port))]


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def comparable(content: dict[str, bytes]) -> dict[str, bytes]:
    """Without what differs from run to run, or with the pieces and the names of inputs."""
    told = (MANIFEST_FILE, "rv_pieces.parquet", "rv_tensors.parquet", "rv_recipe.yaml", "README.md")
    return {name: data for name, data in content.items() if name not in told}


def content_of(uri: str) -> dict[str, bytes]:
    folder = open_folder(uri)
    return {file.name: folder.read(file.name) for file in folder.files()}


def keys_below(uri: str) -> set[str]:
    store, key = open_store(uri)
    return {found.key.removeprefix(f"{key}/") for found in store.list(f"{key}/")}


def copy_in(server: StoreServer, models: Path, folder: str) -> None:
    """The three models into a folder of a store, if they are not there."""
    store, _ = open_store(server.uri(folder))
    if not any(store.list(f"{folder}/")):
        for role in ROLES:
            for path in files_of(models / role):
                store.put(f"{folder}/{path.relative_to(models).as_posix()}", path.read_bytes())


def is_data(method: str, path: str) -> bool:
    """Whether a request reads weights, or sends a shard or a part of one, or ends its upload."""
    of_weights = ".safetensors" in path and ".json" not in path
    sends = of_weights and (method == "PUT" or "uploadId=" in path)
    return (of_weights and method == "GET") or sends or "upload_id=" in path or "uploadType=multipart" in path


def run_with_hub(hub: Hub, folder: Path, *args: str, **more: str) -> subprocess.CompletedProcess[str]:
    """``rv`` in a process of its own, for which ``hub`` is the Hub; ``folder`` is its current one, and ``more`` goes
    into its environment."""
    env = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "hf")}
    argv = [sys.executable, "-m", "rv_distributed", *args]
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}
    return subprocess.run(argv, env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
