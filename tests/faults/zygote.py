"""Runs ``rv`` again and again in processes of their own, without starting Python and loading the kernel each time.

Started by `harness.Zygote` with the fault shim preloaded. Reads a JSON line a run from stdin (``argv``, ``env``, and
the files for ``stdout`` and ``stderr``), forks a child that does it as ``rv`` would, and answers with JSON lines:
``{"pid": …}``, then ``{"stopped": true}`` each time the child is stopped, then ``{"status": …}``, negative for a
signal. Pieces are 1 MiB, so that small checkpoints have several.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from dataclasses import replace
from typing import Any

# What a run imports on its way.
import huggingface_hub
import numpy as np
import pyarrow.parquet
import yaml

import rv_distributed.cli.run
import rv_distributed.runtime.local
from rv_distributed.cli import main, options
from rv_distributed.kernels.compiled import CompiledCombiner, RawOperand
from rv_distributed.plan import PlanOptions
from rv_distributed.recipe import Arithmetic, Weights

IMPORTED = (huggingface_hub.metadata_load, pyarrow.parquet, yaml, rv_distributed.runtime.local)
MIB = 1 << 20


def child(order: dict[str, Any]) -> None:
    """Become an ``rv`` process, and end as one. Does not return."""
    os.setpgid(0, 0)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(order.get(name, os.devnull), flags, 0o600), number)
    os.environ.update(order["env"])
    sys.argv = ["rv", *order["argv"]]
    ctypes.CDLL(None).rv_fault_arm()
    try:
        main()
    except SystemExit as done:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the time that taking the interpreter down takes.
        os._exit(int(done.code or 0))


def load_kernel() -> None:
    """Children find it in their memory."""
    combiner = CompiledCombiner(outputs=1, weighted=False, stats="full", arithmetic=Arithmetic("float32", "nearest", 0))
    zeros, out, operand = np.zeros(8, np.uint8), np.empty((1, 8), np.uint8), RawOperand(0, "F32")
    combiner.compute(zeros, operand, [(operand, None)], [Weights((1.0,))], out, 0, "F32", name="", first=0, sizes=[2])


def small_pieces(self: options.Common) -> PlanOptions:
    return replace(plan_options(self), piece_bytes=MIB)


plan_options = options.Common.plan_options
options.Common.plan_options = small_pieces  # type: ignore[method-assign]

if __name__ == "__main__":
    load_kernel()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        while True:
            _, ended = os.waitpid(pid, os.WUNTRACED)
            if not os.WIFSTOPPED(ended):
                break
            print(json.dumps({"stopped": True}), flush=True)
        print(json.dumps({"status": os.waitstatus_to_exitcode(ended)}), flush=True)
