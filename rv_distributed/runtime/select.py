"""Which runtime a run gets, and what this machine has. Imports neither torch nor ray."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from rv_distributed.errors import UsageError
from rv_distributed.runtime.model import WorkerShape

RuntimeName = Literal["auto", "local", "ray"]
ChosenRuntime = Literal["local", "ray"]
DeviceName = Literal["auto", "cpu", "cuda"]

#: Of NVIDIA's drivers for servers, for boards with a GPU of their own and for Windows' Linux, and of AMD's.
_GPU_DEVICES: Final = ("nvidia[0-9]*", "nvgpu", "nvhost-gpu", "dxg", "kfd")

#: On these a GPU's worker feeds it, hashes and writes.
MOST_CPUS_BESIDE_GPU: Final = 4


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is carried out; nothing here changes a byte of the output."""

    runtime: RuntimeName = "auto"
    """local: threads of this process; ray: worker actors; auto: see `choose_runtime`."""
    address: str | None = None
    """Of the Ray cluster; without one, and without RAY_ADDRESS, a local Ray is started and stopped."""
    workers: int | None = None
    """Threads of the local runtime, or actors under Ray; None for what the machine has, or the cluster at any time.
    A cluster that scales up from few nodes is asked for as many as this says."""
    cpus_per_worker: int | None = None
    """CPUs that an actor is given under Ray, and computes on at once. None for one. Beside a GPU it is given one in any
    case, and computes on this many, by default its share of the node's, four at most: reading, digests and writing are
    still done on them."""
    workers_per_node: int | None = None
    """Most actors on one node of a Ray cluster; None for no limit but its resources."""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that a node of a Ray cluster must have to get actors; values as in Ray's label selectors."""
    device: DeviceName = "auto"
    """auto: a GPU where a worker has one."""
    memory_budget_bytes: int | None = None
    """Most memory for the buffers of one worker process; None for 512 MiB."""
    overwrite: bool = False
    """Replace an output that exists, once the new one is complete."""
    restart: bool = False
    """Throw away what an unfinished run left."""
    allow_nonfinite: bool = False
    """Publish an output that holds NaN or infinity."""

    def __post_init__(self) -> None:
        if self.runtime not in ("auto", "local", "ray"):
            raise UsageError(f"runtime {self.runtime!r} is not one of auto, local, ray")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"device {self.device!r} is not one of auto, cpu, cuda")
        if self.workers is not None and self.workers < 1:
            raise UsageError("--workers must be at least 1")
        if self.cpus_per_worker is not None and self.cpus_per_worker < 1:
            raise UsageError("--cpus-per-worker must be at least 1")
        if self.workers_per_node is not None and self.workers_per_node < 1:
            raise UsageError("--workers-per-node must be at least 1")
        if self.address is not None and self.runtime == "local":
            raise UsageError("--address goes with --runtime ray, not with local")


def choose_runtime(options: RunOptions) -> ChosenRuntime:
    """Ray when it is asked for, when an address is given, when RAY_ADDRESS is set, inside a Ray job, or when
    this machine has several GPUs that may be used; else local."""
    if options.runtime != "auto":
        return options.runtime
    hinted = options.address or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID")
    if hinted or (options.device != "cpu" and visible_gpus() > 1):
        return "ray"
    return "local"


def expected_shape(options: RunOptions, runtime: ChosenRuntime) -> WorkerShape:
    """What a worker has, as far as can be said before there is one."""
    has_gpu = options.device == "cuda"
    if runtime == "local":
        return WorkerShape(usable_cpus(), has_gpu or (options.device == "auto" and may_have_gpus()))
    return WorkerShape(options.cpus_per_worker or (MOST_CPUS_BESIDE_GPU if has_gpu else 1), has_gpu)


def visible_gpus() -> int:
    """NVIDIA GPUs of this machine that CUDA_VISIBLE_DEVICES admits."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    folder = Path("/proc/driver/nvidia/gpus")
    present = len(list(folder.iterdir())) if folder.is_dir() else 0
    if chosen is None:
        return present
    return min(present, len([name for name in chosen.split(",") if name.strip() not in ("", "-1")]))


def may_have_gpus() -> bool:
    """Whether torch could find a GPU here: where no driver has made a device, it cannot."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and any(any(Path("/dev").glob(name)) for name in _GPU_DEVICES)


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
