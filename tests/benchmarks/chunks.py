"""How fast blocks are computed, with nothing read or written: on the processors, and on a GPU if there is one.

    python tests/benchmarks/chunks.py [--elements N] [--repeats N]

Each line is a device, what is measured, the bytes of a chunk, and how many streams there are at once. A GPU's figures
include the copies to it and back, out of pinned memory.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from itertools import product
from typing import Final

import numpy as np
import torch

from rv_distributed.checkpoint.sources import Operand
from rv_distributed.measures import Measures
from rv_distributed.plan import Span
from rv_distributed.plan.model import VectorOperand
from rv_distributed.recipe import Arithmetic, Stats, Weights
from rv_distributed.runtime.arena import Found
from rv_distributed.runtime.buffers import Buffer
from rv_distributed.runtime.compiled_block import CompiledBlock
from rv_distributed.runtime.compute import Block
from rv_distributed.runtime.model import BLOCK_BYTES, WorkerConfig
from rv_distributed.runtime.torch_block import TorchBlock

_STREAMS: Final = (1, 4, 12)
_LEVELS: Final[tuple[Stats, ...]] = ("none", "full")


def main() -> None:
    """Print a line for every combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[2 << 20, 8 << 20], help="of a chunk, in bfloat16")
    parser.add_argument("--repeats", type=int, default=50)
    given = parser.parse_args()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device, level, elements, streams in product(devices, _LEVELS, given.elements, _STREAMS):
        seconds = _seconds(device, level, elements, streams, given.repeats)
        speed = 2 * elements * streams / seconds / 1e9
        print(f"{device}, statistics {level}, {2 * elements} bytes, {streams} at once: {speed:.2f} GB/s", flush=True)


def _seconds(device: str, level: Stats, elements: int, streams: int, repeats: int) -> float:
    """For a chunk in each of the streams, all at once."""
    ready, spans = threading.Barrier(streams), list[float]()

    def stream() -> None:
        compute = _prepared(device, level, elements)
        compute()
        ready.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            compute()
        spans.append((time.perf_counter() - began) / repeats)

    threads = [threading.Thread(target=stream) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(spans) / streams


def _prepared(device: str, level: Stats, elements: int) -> Callable[[], list[list[Measures]]]:
    """Computes a chunk of random values again and again."""
    nbytes = 2 * elements
    config = WorkerConfig(
        outputs=("",),
        numbers=(0,),
        weighted=False,
        device=device,
        streams=1,
        cpus=1,
        chunk_bytes=nbytes,
        arenas=1,
        buffer_bytes=4 * nbytes,
        stats=level,
        arithmetic=Arithmetic("float32", "nearest", 0),
    )
    # Both stay with the function that is returned: memory is pinned as long as its buffer is there.
    arena, out = (Buffer(parts * nbytes, pinned=device != "cpu") for parts in (3, 1))
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.02, (3, elements)).astype(np.float32)
    arena.array[: 3 * nbytes] = (values.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    operand = Operand("", 0, "BF16")
    span = Span(0, "w", "BF16", 0, nbytes, 0, "combine", operand, (VectorOperand(0, operand, operand),), ())
    found = [Found(number * nbytes) for number in range(3)]
    block: Block = CompiledBlock(config) if device == "cpu" else TorchBlock(config, device, nbytes)
    size = BLOCK_BYTES // 2 if device == "cpu" else elements
    sizes = [min(size, elements - first) for first in range(0, elements, size)]

    def compute() -> list[list[Measures]]:
        return block(span, found, [Weights((0.7,))], arena.array, out.array[:nbytes].reshape(1, nbytes), 0, 0, sizes)

    return compute


if __name__ == "__main__":
    main()
