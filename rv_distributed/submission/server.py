"""The job server of a cluster. The only module here that imports ray."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from rv_distributed.errors import RunError, UsageError, one_line
from rv_distributed.submission.request import JobRequest

#: In Ray's client these win over the address that it is given.
_ADDRESS_VARIABLES: Final = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
#: Seconds to connect, and between two bytes of an answer.
_TIMEOUT_S: Final = (10, 60)


@dataclass(frozen=True, slots=True)
class JobState:
    """What the job server says of a job."""

    submission_id: str
    status: str
    """pending, running, stopped, succeeded or failed."""
    driver_exit_code: int | None
    """Of the rv command itself, once it has ended on its own."""
    message: str
    """Ray's explanation."""

    @property
    def ended(self) -> bool:
        return self.status not in ("pending", "running")

    @property
    def exit_status(self) -> int:
        """The driver's own; 143 for a job that was stopped, 1 for one that ended without a status."""
        if self.status == "stopped":
            return 143
        code = self.driver_exit_code
        if code is None:
            return 0 if self.status == "succeeded" else 1
        return code if code >= 0 else 128 - code


class JobServer:
    """The job server of a Ray cluster."""

    def __init__(self, address: str) -> None:
        """Connect. Raises UsageError when nothing usable answers, or Ray's job client is not installed."""
        if not address.startswith(("http://", "https://")):
            raise UsageError(
                f"--address: {address} is no URL; give the cluster's job server (its dashboard), "
                "such as http://HEAD:8265"
            )
        try:
            import aiohttp
            import requests
            from ray.exceptions import RayError
        except ImportError as error:
            raise UsageError(
                f"rv submit needs Ray's job client, and {error.name} is not installed: pip install 'ray[default]'"
            ) from None
        self.address = address
        self.failures = (aiohttp.ClientError, requests.RequestException, RayError, OSError, RuntimeError, ValueError)
        """What Ray's client raises when the server does not answer, or not as it should."""
        for name in _ADDRESS_VARIABLES:
            os.environ.pop(name, None)
        try:
            self.client = _client(address)
        except RayError as error:
            # That of a missing or wrong token tells what to do.
            raise UsageError(f"{address}: {brief(error)}") from None
        except self.failures as error:
            raise UsageError(
                f"no Ray job server answers at {address}: {brief(error)}. Check that the cluster is up, that it has "
                "ray[default], that its dashboard listens on this address (ray start --dashboard-host 0.0.0.0), and "
                "that a firewall or a missing port-forward is not in between"
            ) from None

    def submit(self, request: JobRequest) -> tuple[JobState, bool]:
        """Submit, unless a job that has not ended does this work. Returns the job, and whether it was there before.

        Raises UsageError when the server refuses, or what is to be sent cannot be read.
        """
        known = self._known()
        for number in count(1):
            name = request.submission_id if number == 1 else f"{request.submission_id}-{number}"
            if name not in known:
                return self._submit_as(name, request)
            if not known[name].ended:
                return known[name], True
        raise AssertionError("there is always another number")

    def _submit_as(self, name: str, request: JobRequest) -> tuple[JobState, bool]:
        try:
            with request.runtime_env() as env:
                self.client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=name,
                    runtime_env=env,
                    entrypoint_num_cpus=request.cpus or None,
                    entrypoint_memory=request.memory_bytes or None,
                )
            return self.state(name), False
        except self.failures as error:
            # The same command may have been submitted elsewhere just before, or the answer alone was lost.
            job = self._known().get(name)
            if job is None:
                raise UsageError(f"{self.address} refused the job: {brief(error)}") from None
            return job, True

    def state(self, submission_id: str) -> JobState:
        """What became of a job. Raises one of `failures`."""
        return _state(self.client.get_job_info(submission_id))

    def stop(self, submission_id: str) -> JobState:
        """Ask a job to stop; one that is still pending does so once it starts. Raises RunError when that fails."""
        try:
            self.client.stop_job(submission_id)
            return self.state(submission_id)
        except self.failures as error:
            raise RunError(f"job {submission_id} could not be stopped: {brief(error)}") from None

    def _known(self) -> dict[str, JobState]:
        try:
            jobs = self.client.list_jobs()
        except self.failures as error:
            raise UsageError(f"{self.address} does not list its jobs: {brief(error)}") from None
        return {job.submission_id: _state(job) for job in jobs if job.submission_id}


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    # It tells of every stream that ends.
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's, which waits for an answer without end."""

        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, **{"timeout": _TIMEOUT_S, **kwargs})

    return Client(address)


def _state(job: Any) -> JobState:
    return JobState(job.submission_id, job.status.value.lower(), job.driver_exit_code, job.message or "")


def brief(error: Exception) -> str:
    """The last line of an error of Ray's client: a job server answers with tracebacks."""
    lines = str(error).strip().splitlines()
    return one_line(lines[-1].rstrip(". ") if lines else type(error).__name__)
