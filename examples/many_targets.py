"""Move one skill to many models, several at a time, on one Ray cluster.

    python many_targets.py --donor /models/grpo --reference /models/sft --out '/models/out/{name}' \\
        --address auto --at-once 4 /models/a /models/b /models/c

Every target is a run of its own: with its own manifest, resumed by the same command, left alone when it is up to date.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import ray

import rv_distributed as rv


def main() -> int:
    """Make all outputs; exit status 0 when all are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", help="checkpoints that receive the vector")
    parser.add_argument("--donor", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--out", required=True, help="folder to make; {name} is the target's own name")
    parser.add_argument("--address", help="of the Ray cluster; without it, Ray starts on this machine")
    parser.add_argument("--at-once", type=int, default=2, help="targets at a time")
    parser.add_argument("--workers", type=int, help="workers of each of them")
    given = parser.parse_args()

    # One connection for all; each run takes workers of the cluster, and gives them back.
    ray.init(address=given.address, log_to_driver=False, logging_level="ERROR")
    cancel = threading.Event()
    options = rv.RunOptions(runtime="ray", workers=given.workers)

    def make(target: str) -> rv.Manifest:
        out = given.out.replace("{name}", os.path.basename(target.rstrip("/")))
        return rv.transfer(
            target, given.donor, given.reference, out, alpha=given.alpha, run_options=options, cancel=cancel
        )

    failed = 0
    with ThreadPoolExecutor(given.at_once) as pool:
        runs: dict[Future[rv.Manifest], str] = {pool.submit(make, target): target for target in given.targets}
        try:
            for run in as_completed(runs):
                try:
                    totals = run.result().totals
                    print(f"{runs[run]}: {totals.changed_elements} of {totals.parameters} elements changed", flush=True)
                except rv.RvError as error:
                    failed += 1
                    print(f"{runs[run]}: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            # What is finished of each is kept: the same command resumes.
            cancel.set()
            pool.shutdown(cancel_futures=True)
            return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
