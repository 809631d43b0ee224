"""What we are measured against: mergekit in an environment of its own, and a copy without arithmetic.

`rows` calls `mergekit` for the command of a merge. Run as a script, this module is the other peers, each
a process of its own that prints one JSON document:

    peers.py copy OUT BASE SFT GRPO --threads N --chunk BYTES   read three checkpoints, write one
    peers.py transfer OUT BASE SFT GRPO                         our transfer, with torch loaded before it starts
    peers.py apply OUT TARGET VECTOR [--bare]                   our apply, the same; or without measures and digests
    peers.py rv ARGUMENT …                                      `rv`, on a disk of any size (its own output)
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import numpy as np

from rv_distributed import api, cli, job
from rv_distributed.kernels.compiled import CompiledCombiner, RawOperand
from rv_distributed.plan import size_pieces
from rv_distributed.recipe import Arithmetic, Weights
from rv_distributed.runtime.model import WorkerConfig
from rv_distributed.runtime.select import RunOptions
from rv_distributed.storage.publish import preallocate
from rv_distributed.storage.ranges import RangeReader, RangeWriter

MERGEKIT: Final = "mergekit==0.1.5"
MERGEKIT_FLAGS: Final = ("--async-write", "--write-threads", "2", "--no-copy-tokenizer", "--quiet")
#: Nothing is looked up on the network.
MERGEKIT_ENV: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def mergekit_environment(folder: Path) -> Path:
    """The program mergekit-yaml of the virtual environment ``folder``, which is made when it is not there.

    mergekit gets our own release of torch, from wherever pip is set up to find it. Raises CalledProcessError.
    """
    program = folder / "bin" / "mergekit-yaml"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, f"torch=={version('torch').partition('+')[0]}"], check=True)
        subprocess.run([*pip, MERGEKIT], check=True)
    return program


def mergekit(program: Path, recipe: Path, out: Path, *, base: Path, sft: Path, grpo: Path) -> list[str]:
    """The command that writes base + (grpo − sft) to ``out``; writes its recipe to the file ``recipe``."""
    models = [
        {"model": str(path), "parameters": {"weight": weight}} for path, weight in ((base, 1), (grpo, 1), (sft, -1))
    ]
    document = {
        "merge_method": "linear",
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    recipe.write_text(json.dumps(document, indent=2))  # which is YAML, too
    return [str(program), str(recipe), str(out), *MERGEKIT_FLAGS]


class _Part(NamedTuple):
    """A range of one file that one thread copies."""

    sources: tuple[str, ...]
    out: str
    start: int
    stop: int


def copy(out: Path, sources: Sequence[Path], *, threads: int, chunk_bytes: int) -> dict[str, Any]:
    """Read all of ``sources``, checkpoints with files alike, and write the bytes of the first to ``out``.

    Threads, sizes of ranges and chunks, readers, writers and preallocation are those of a run of ours; the
    seconds begin when the files are there, as ours do. ``seconds``, ``bytes_read`` and ``bytes_written``.
    """
    out.mkdir()
    parts = list(_parts(out, sources))
    taking, queue, errors = threading.Lock(), iter(parts), list[BaseException]()

    def stream() -> None:
        try:
            _copy_parts(_shared(queue, taking), len(sources), chunk_bytes)
        except BaseException as error:
            errors.append(error)

    began = time.monotonic()
    running = [threading.Thread(target=stream) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    seconds = time.monotonic() - began
    if errors:
        raise errors[0]
    written = sum(part.stop - part.start for part in parts)
    return {"seconds": seconds, "bytes_read": written * len(sources), "bytes_written": written}


def _shared(items: Iterator[_Part], lock: threading.Lock) -> Iterator[_Part]:
    """The items that this thread gets of an iterator that several share."""
    while True:
        with lock:
            item = next(items, None)
        if item is None:
            return
        yield item


def _parts(out: Path, sources: Sequence[Path]) -> Iterator[_Part]:
    shards = list(zip(*(sorted(source.glob("*.safetensors")) for source in sources), strict=True))
    sizes = [min(name.stat().st_size for name in names) for names in shards]
    part_bytes = size_pieces(sum(sizes))
    for names, size in zip(shards, sizes, strict=True):
        target = str(out / names[0].name)
        preallocate(target, size)
        for start in range(0, size, part_bytes):
            yield _Part(tuple(map(str, names)), target, start, min(start + part_bytes, size))


def _copy_parts(parts: Iterator[_Part], sources: int, chunk_bytes: int) -> None:
    buffers = [memoryview(mmap.mmap(-1, chunk_bytes)) for _ in range(sources)]
    for part in parts:
        with ExitStack() as stack:
            readers = [stack.enter_context(closing(RangeReader(path))) for path in part.sources]
            writer = stack.enter_context(closing(RangeWriter(part.out)))
            for start in range(part.start, part.stop, chunk_bytes):
                nbytes = min(chunk_bytes, part.stop - start)
                for reader, buffer in zip(readers, buffers, strict=True):
                    reader.read(buffer, 0, start, nbytes)
                writer.write(buffers[0][:nbytes], start)
            writer.finish()


class _NoDigest:
    """Stands in for a BLAKE3 hasher."""

    def update(self, _data: memoryview) -> None: ...

    def hexdigest(self) -> str:
        return "0" * 64


def transfer(out: Path, sources: Sequence[Path]) -> dict[str, Any]:
    """Our local transfer from base, sft and grpo; ``seconds`` are those of its streaming alone."""
    base, sft, grpo = map(str, sources)
    _warm_up()
    manifest = api.transfer(base, grpo, sft, str(out), run_options=RunOptions(runtime="local"))
    return {"seconds": manifest.timings.run_s}


def apply(out: Path, sources: Sequence[Path], *, bare: bool) -> dict[str, Any]:
    """Our local apply of a target and a vector; ``bare`` leaves out statistics and digests of tensors.

    ``seconds`` as of `transfer`. What a bare run writes does not verify.
    """
    target, vector = map(str, sources)
    worker = _warm_up()

    def config(*args: Any, **options: Any) -> WorkerConfig:
        return replace(WorkerConfig(*args, **options), stats="none")

    with ExitStack() as stack:
        if bare:
            stack.enter_context(patch.object(job, "WorkerConfig", config))
            stack.enter_context(patch.object(worker, "blake3", _NoDigest))
        manifest = api.apply(target, [(vector, 1.0)], str(out), run_options=RunOptions(runtime="local"))
    return {"seconds": manifest.timings.run_s}


def _warm_up() -> ModuleType:
    """The worker's module, with its kernel loaded, which takes time that is not streaming."""
    combiner = CompiledCombiner(outputs=1, weighted=False, stats="full", arithmetic=Arithmetic("float32", "nearest", 0))
    zeros, out, operand = np.zeros(8, np.uint8), np.empty((1, 8), np.uint8), RawOperand(0, "F32")
    combiner.compute(zeros, operand, [(operand, None)], [Weights((1.0,))], out, 0, "F32", name="", first=0, sizes=[2])
    return import_module("rv_distributed.runtime.worker")


def rv_on_any_disk(arguments: Sequence[str]) -> None:
    """`rv` with the given arguments, told that a petabyte of disk is free: for plans that are not carried out."""
    usage = type(shutil.disk_usage(os.curdir))(10**15, 0, 10**15)
    with patch.object(shutil, "disk_usage", lambda _path: usage), patch.object(sys, "argv", ["rv", *arguments]):
        cli.main()


def main() -> None:
    """Be one of the peers."""
    if sys.argv[1:2] == ["rv"]:
        rv_on_any_disk(sys.argv[2:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=("copy", "transfer", "apply"))
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=4 << 20)
    parser.add_argument("--bare", action="store_true")
    given = parser.parse_args()
    if given.peer == "copy":
        result = copy(given.out, given.sources, threads=given.threads, chunk_bytes=given.chunk)
    elif given.peer == "transfer":
        result = transfer(given.out, given.sources)
    else:
        result = apply(given.out, given.sources, bare=given.bare)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
