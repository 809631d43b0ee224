"""Saves distributed checkpoints as trainers do, from several processes of a gloo group on this machine.

``python distributed_saver.py RANKS FOLDER``. Rank 0 also saves the whole tensors, as ``FOLDER/whole``.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor


def whole_tensors() -> dict[str, torch.Tensor]:
    """Of several shapes and dtypes; some are cut unevenly, and some have too few rows for all ranks."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "a": ((300, 401), torch.bfloat16),
        "b": ((7, 1001), torch.float32),
        "c": ((3, 50, 66), torch.float16),
        "d": ((1000,), torch.bfloat16),
        "e": ((1, 9), torch.float32),
        "f": ((2, 3, 5, 8), torch.float32),
        "g": ((1500, 700), torch.bfloat16),
    }
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, (shape, dtype) in shapes.items()}
    return {**found, "steps": torch.arange(24, dtype=torch.int64).reshape(4, 6), "scalar": torch.tensor(2.5)}


def placements() -> list[tuple[Placement, Placement]]:
    """On a mesh of two dimensions, as data and tensor parallelism share it."""
    return [(Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Shard(1))]


class Model(nn.Module):
    """Two layers and a norm, named as models of transformers name theirs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = nn.ModuleDict({"up": nn.Linear(33, 70), "down": nn.Linear(70, 33), "norm": nn.LayerNorm(33)})

    def forward(self, x: torch.Tensor) -> Any:
        return self.model["norm"](self.model["down"](self.model["up"](x)))


def save_meshes(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    for number, placed in enumerate(placements()):
        tensors: dict[str, Any] = {}
        for name, tensor in whole_tensors().items():
            fits = all(not isinstance(of, Shard) or of.dim < tensor.ndim for of in placed)
            tensors[name] = distribute_tensor(tensor, mesh, placed) if fits else tensor
        state_dict_saver.save(tensors, checkpoint_id=folder / f"mesh{number}")


def save_fsdp(folder: Path) -> None:
    model = Model()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in model.model.values():
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(2, 33)).sum().backward()
    optimizer.step()
    states = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer), "step": 3}
    state_dict_saver.save({"app": states}, checkpoint_id=folder / "fsdp")
    if dist.get_rank() == 0:
        for name, tensors in (("whole", whole_tensors()), ("whole-fsdp", whole)):
            (folder / name).mkdir()
            save_file(tensors, str(folder / name / "model.safetensors"))


def save(rank: int, ranks: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    save_meshes(folder)
    save_fsdp(folder)
    dist.destroy_process_group()


def main() -> int:
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    # Forked, so that torch is imported once.
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=save, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return max(abs(process.exitcode or 0) for process in processes)


if __name__ == "__main__":
    sys.exit(main())
