"""What a cluster adds, shown on two cores: workers whose storage is slow, so that they and not the cores are the limit.

    scaling.py throughput OUT BASE SFT GRPO --workers N --rate BYTES --seconds S

runs our transfer on N workers of two raylets, each reading no faster than BYTES a second, and prints the bytes a second
that they wrote together while all of them were at work, over at least S seconds.

    scaling.py large OUT BASE SFT GRPO

plans a transfer of sparse checkpoints, and times what the driver would do for it beside waiting: making the tasks,
taking in results, and the files of the commit. Prints seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rv_distributed import api
from rv_distributed.checkpoint.index import build_index
from rv_distributed.checkpoint.table import write_table
from rv_distributed.identity import identity_of
from rv_distributed.measures import Measures
from rv_distributed.plan import PIECE_ALIGNMENT, Plan, PlanOptions, task_of
from rv_distributed.preparing import prepare
from rv_distributed.recipe import Recipe, Vector
from rv_distributed.reduce import Reducer
from rv_distributed.runtime.model import SpanResult
from rv_distributed.runtime.select import RunOptions
from rv_distributed.staging import Record, open_staging
from rv_distributed.watching import Progress

TESTS: Final = Path(__file__).parent.parent
_RAYLETS: Final = 2


class _Enough(Exception):
    """All workers have been at work for long enough."""


def throughput(out: Path, sources: Sequence[Path], *, workers: int, rate: float, seconds: float) -> dict[str, Any]:
    """Bytes a second that all workers write together, from the moment when each has finished a piece."""
    sys.path.insert(0, str(TESTS))
    import ray
    import throttle
    from ray.cluster_utils import Cluster

    seen: list[tuple[float, int]] = []
    since = 0.0

    def progress(now: Progress) -> None:
        nonlocal since
        seen.append((now.seconds, now.bytes_written))
        if len(now.workers) == workers:
            since = since or now.seconds
            if now.seconds - since >= seconds:
                raise _Enough

    with TemporaryDirectory() as folder:
        slow = Path(folder, "rate")
        slow.write_text(str(rate))
        paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        os.environ |= {throttle.RATE: str(slow), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": paths}
        small = {"object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
        try:
            for number in range(_RAYLETS):
                cluster.add_node(num_cpus=(workers + number) // _RAYLETS, **small)
            hook = {"worker_process_setup_hook": "throttle.slow_reads"}
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR", runtime_env=hook)
            plan = PlanOptions(piece_bytes=2 * PIECE_ALIGNMENT)
            how = RunOptions(runtime="ray", workers=workers)
            base, sft, grpo = map(str, sources)
            with suppress(_Enough):
                api.transfer(base, grpo, sft, str(out), plan_options=plan, run_options=how, progress=progress)
        finally:
            ray.shutdown()
            cluster.shutdown()
    window = [(at, written) for at, written in seen if at >= since]
    if not since or len(window) < 2:
        raise SystemExit(f"the run ended before all {workers} workers were at work")
    (start, before), (stop, after) = window[0], window[-1]
    return {"bytes_per_s": (after - before) / (stop - start)}


def large(out: Path, sources: Sequence[Path]) -> dict[str, Any]:
    """Seconds of the driver for a run of which not one byte is moved."""
    base, sft, grpo = map(str, sources)
    recipe = Recipe("transfer", base, (Vector(grpo, sft),), ((1.0,),))
    times: dict[str, Any] = {}
    began = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal began
        times[name] = time.perf_counter() - began
        began = time.perf_counter()

    job = prepare(recipe, [str(out)], PlanOptions(), RunOptions(runtime="ray"))
    plan = job.plan
    lap("plan_s")
    for piece in plan.pieces:
        task_of(plan, piece)
    lap("tasks_s")
    staging = open_staging(str(out), identity_of(plan, 0), overwrite=True, restart=True)
    reducer = Reducer(plan, 0, staging)
    lap("claim_s")
    for piece in plan.pieces:
        spans = _results(plan, piece.number)
        reducer.add(piece.number, spans)
        staging.record(Record(piece.number, spans, ""), plan.shards[piece.shard].name)
    lap("records_s")
    rows, _ = reducer._results
    write_table(rows)
    build_index({row.name: row.shard for row in rows}, plan.data_bytes)
    lap("tables_s")
    staging.close()
    sizes = {"pieces": len(plan.pieces), "tensors": len(plan.tensors), "shards": len(plan.shards)}
    return {**times, **sizes, "bytes": plan.output_bytes}


def _results(plan: Plan, number: int) -> tuple[SpanResult, ...]:
    task = task_of(plan, plan.pieces[number])
    return tuple(
        SpanResult(span.tensor, "0" * 64, Measures(1.0, 1.0, 0.1, 0.7, 0.2, 1.0, 9, 8, 1, 2, ulps=(8,) * 8))
        for span in task.spans
    )


def main() -> None:
    """One of the two, by the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "large"])
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", type=Path, nargs=3, metavar="CHECKPOINT", help="BASE SFT GRPO")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    if args.what == "large":
        print(json.dumps(large(args.out, args.sources)))
    else:
        how = {"workers": args.workers, "rate": args.rate, "seconds": args.seconds}
        print(json.dumps(throughput(args.out, args.sources, **how)))


if __name__ == "__main__":
    main()
