"""An Airflow DAG: check the inputs, move the skill at several strengths in one pass, and verify every output.

rv has to be installed where the tasks run, and the models have to be on storage that they share. A task that failed or
was killed is tried again and resumes; bad input, exit status 2, is not tried again.
"""

from __future__ import annotations

import json
import subprocess
from datetime import datetime, timedelta

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowFailException

MODELS = "/shared/models"  # edit
OUT = "/shared/models/out-{alpha}"  # edit
COMMAND = [
    *("rv", "transfer", "--target", f"{MODELS}/instruct"),
    *("--donor", f"{MODELS}/grpo", "--reference", f"{MODELS}/sft", "--out", OUT),
]


def rv(*arguments: str) -> dict[str, object]:
    """The JSON document of an rv command. Its progress goes to the task's log."""
    done = subprocess.run(
        [*arguments, "--json", "--log-format", "json"], stdout=subprocess.PIPE, text=True, check=False
    )
    document = json.loads(done.stdout or "{}")
    if done.returncode == 2:
        raise AirflowFailException(document["error"]["message"])
    if done.returncode != 0:
        raise RuntimeError(f"rv exited with {done.returncode}")
    return document


@dag(
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    params={"alphas": "0.5,0.7,1.0"},
    default_args={"retries": 3, "retry_delay": timedelta(minutes=1), "execution_timeout": timedelta(hours=6)},
)
def reasoning_transfer() -> None:
    """transfer → verify, one task an output."""

    @task
    def plan(params: dict[str, str] | None = None) -> int:
        """Find every problem of the inputs before anything is written."""
        document = rv(*COMMAND, "--alpha", (params or {})["alphas"], "--dry-run")
        return int(document["plan"]["bytes_written"])  # type: ignore[index]

    @task
    def transfer(bytes_written: int, params: dict[str, str] | None = None) -> list[str]:
        """Make all outputs; those that are up to date are left alone."""
        print(f"{bytes_written} bytes to write")
        document = rv(*COMMAND, "--alpha", (params or {})["alphas"])
        return [output["path"] for output in document["outputs"]]  # type: ignore[attr-defined, index]

    @task
    def verify(out: str) -> None:
        """Read the output again and compare every byte with its manifest."""
        subprocess.run(["rv", "verify", out, "--json"], check=True)

    verify.expand(out=transfer(plan()))


reasoning_transfer()
