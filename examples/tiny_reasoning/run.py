"""One seed, from nothing to a report: train the models, then extract, apply, transfer, evaluate and report with rv.

python examples/tiny_reasoning/run.py --seed 0 --out tiny-reasoning
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Final

ALPHAS: Final = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PERTURBATIONS: Final = ("noise", "rename", "reorder", "distract")
#: Exit status of a seed whose base did not learn.
NOT_LEARNED: Final = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tiny-reasoning"), help="a folder that does not exist")
    parser.add_argument("--problems", type=int, default=512, help="held-out problems of the evaluation")
    parser.add_argument("--toy", action="store_true", help="train next to nothing, to see that everything runs")
    given = parser.parse_args()
    # One thread is the fastest for a model of this size, and leaves the other processors to other seeds.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from train import TOY, Effort, NotLearned, train

    torch.set_num_threads(1)
    given.out.mkdir(parents=True)
    try:
        family = train(given.seed, TOY if given.toy else Effort())
    except NotLearned as error:
        print(f"seed {given.seed}: {error}", file=sys.stderr)
        return NOT_LEARNED
    for name, model in family._asdict().items():
        model.save(given.out / "models" / name)
    write_task(given.out / "tasks", given.problems)
    use_rv(given.out)
    return 0


def write_task(folder: Path, count: int) -> None:
    """Held-out problems, the same for every seed, as a task of lm-evaluation-harness."""
    from problems import LONGEST, draw, sentences

    rng = random.Random("held out")
    folder.mkdir()
    with open(folder / "problems.jsonl", "w", encoding="utf-8") as file:
        for number in range(count):
            problem = draw(rng, 2 + number % (LONGEST - 1))
            # Without the character that every prompt ends with, which the task adds.
            question = sentences(problem, range(len(problem.steps) + 1)).removesuffix(":")
            file.write(json.dumps({"question": question, "answer": str(problem.answer)}) + "\n")
    task = {
        "task": "tiny_chains",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / "problems.jsonl").resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["#\n"], "max_gen_toks": 7 * LONGEST + 8, "do_sample": False},
        # The answer, where the solution ends with it.
        "filter_list": [{"name": "answer", "filter": [_regex("#([0-9])$"), {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    # JSON is YAML.
    (folder / "tiny_chains.yaml").write_text(json.dumps(task, indent=2), encoding="utf-8")


def _regex(pattern: str) -> dict[str, str]:
    return {"function": "regex", "regex_pattern": pattern}


def use_rv(out: Path) -> None:
    """Everything that rv does here: each line is a command that could be typed."""
    target, donor, reference = (out / "models" / name for name in ("target", "donor", "reference"))
    parents: tuple[str | Path, ...] = ("--donor", donor, "--reference", reference)
    rv("extract", *parents, "--out", out / "vector")
    rv("apply", "--target", target, "--vector", out / "vector", "--alpha", "1.0", "--out", out / "applied")
    rv("transfer", "--target", target, *parents, "--alpha", "1.0", "--out", out / "transferred")
    rv("verify", out / "applied", "--against-inputs")
    if (out / "applied/model.safetensors").read_bytes() != (out / "transferred/model.safetensors").read_bytes():
        raise SystemExit("extract and apply gave other bytes than transfer")
    how: list[str | Path] = ["--tasks", "tiny_chains", "--task-path", out / "tasks"]
    how += ["--perturb", ",".join(PERTURBATIONS), "--in-memory", "--batch-size", "128", "--runtime", "local"]
    alphas = ",".join(map(str, ALPHAS))
    rv(
        "eval",
        "--target",
        target,
        "--vector",
        out / "vector",
        "--alpha",
        alphas,
        "--minus",
        *how,
        "--out",
        out / "eval",
    )
    for control in ("random", "full"):
        vector = ("--donor", out / "models" / control, "--reference", reference)
        rv("eval", "--target", target, *vector, *how, "--out", out / f"eval-{control}")
    rv("report", out / "applied", "--eval", out / "eval", "--out", out / "report.html")


def rv(*arguments: str | Path) -> None:
    """Run a command of rv, and show it."""
    texts = list(map(str, arguments))
    print("\n$ rv", *texts, flush=True)
    subprocess.run([sys.executable, "-m", "rv_distributed", *texts], check=True)


if __name__ == "__main__":
    sys.exit(main())
