"""Jobs of a Ray cluster, through its job server: where ``rv submit`` talks to Ray.

`JobServer` connects; `JobServer.submit` sends a `JobRequest`, or finds the job that already does that work;
`Follower` then gives the lines of its log and, at the end, its `JobState`. The status and the exit status come from
the job server itself: a log stream that ends says nothing about the job.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import shlex
import tempfile
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import blake3

from rv_distributed.errors import RunError, UsageError, one_line, redacted

#: In Ray's client these win over the address that it is given.
ADDRESS_VARIABLES: Final = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
#: What a driver takes: Ray's client, the plan and the results. 130 MB measured, for a small plan.
DRIVER_BYTES: Final = 512 << 20
#: How long a stopped job may take to end before Ray kills it; Ray's own 3 s are short for a slow storage.
STOP_WAIT_S: Final = 30
#: After so long without an answer the job server counts as lost; the head of a cluster may restart meanwhile.
_LOST_S: Final = 120.0
#: Without log lines for so long, the status is asked for: the stream may be dead without knowing it.
_SILENCE_S: Final = 20.0
_PAUSE_S: Final = 1.0
#: Seconds to connect, and between two bytes of an answer.
_TIMEOUT_S: Final = (10, 60)
#: Attempts to read the log of a job that has ended; it may have gone with its node.
_LAST_READS: Final = 3


@dataclass(frozen=True, slots=True)
class JobRequest:
    """An rv command line for a cluster, and what it needs there."""

    arguments: tuple[str, ...]
    """Of rv; the command's name is the first."""
    parsed: Mapping[str, object]
    """The same as the command's parameters: however it was written, the same work has the same name."""
    cpus: float = 0.0
    """Reserved for the driver."""
    memory_bytes: int = DRIVER_BYTES
    """Reserved for the driver. With neither CPUs nor memory, Ray ties it to the head node."""
    working_dir: str | None = None
    """Folder to send along; the job's current directory."""
    wheel: str | None = None
    """Wheel of rv_distributed to send along; its dependencies must be installed on the nodes."""
    image: str | None = None
    """Container image of the driver and the workers."""

    @property
    def submission_id(self) -> str:
        """Names the work, wherever it is submitted to."""
        work = [self.arguments[0], self.parsed, self.working_dir, self.wheel, self.image]
        text = json.dumps(work, sort_keys=True, default=str)
        return f"rv-{self.arguments[0]}-{blake3.blake3(text.encode()).hexdigest(length=8)}"

    @property
    def entrypoint(self) -> str:
        return shlex.join(("python", "-m", "rv_distributed", *self.arguments))

    @contextmanager
    def runtime_env(self) -> Iterator[dict[str, Any]]:
        """Ray's description of the environment; its local files exist inside the context. Raises UsageError."""
        env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        if self.working_dir is not None:
            env["working_dir"] = self.working_dir
        if self.image is not None:
            env["image_uri"] = self.image
        with tempfile.TemporaryDirectory() as folder:
            if self.wheel is not None:
                env["py_modules"] = [_unpacked(self.wheel, folder)]
                # Python and Ray both look into the current directory first, which may hold another rv_distributed.
                env.setdefault("working_dir", folder)
            yield env


def _unpacked(wheel: str, folder: str) -> str:
    """The package in a wheel. As a package, and not as a wheel, Ray takes it without pip and a network."""
    package = Path(folder, "rv_distributed")
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"--wheel: {wheel} cannot be read ({error})") from None
    if not (package / "__main__.py").is_file():
        raise UsageError(f"--wheel: {wheel} is no wheel of rv_distributed; make one with: make build")
    return str(package)


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
        for name in ADDRESS_VARIABLES:
            os.environ.pop(name, None)
        try:
            self.client = _client(address)
        except self.failures as error:
            raise UsageError(
                f"no Ray job server answers at {address}: {_brief(error)}. Check that the cluster is up, that it has "
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
                raise UsageError(f"{self.address} refused the job: {_brief(error)}") from None
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
            raise RunError(f"job {submission_id} could not be stopped: {_brief(error)}") from None

    def _known(self) -> dict[str, JobState]:
        try:
            jobs = self.client.list_jobs()
        except self.failures as error:
            raise UsageError(f"{self.address} does not list its jobs: {_brief(error)}") from None
        return {job.submission_id: _state(job) for job in jobs if job.submission_id}


class Follower:
    """The log of a job, line by line, and then its end.

    A thread reads, so that a signal finds the main thread waiting in `next`, where it can raise: what was not taken
    yet is still there afterwards.
    """

    def __init__(self, server: JobServer, submission_id: str) -> None:
        self._server = server
        self._id = submission_id
        self._items: queue.SimpleQueue[str | JobState | BaseException] = queue.SimpleQueue()
        self._seen = 0
        """Characters of the log that were read; every stream begins at its start."""
        self._partial = ""
        self._answered = time.monotonic()
        # A daemon: at the exit nobody waits for a server that does not answer.
        threading.Thread(target=self._run, daemon=True).start()

    def next(self, timeout_s: float | None = None) -> str | JobState:
        """The next line of the log, or the job's state: while it is silent, and, as the last item, at its end.

        Raises RunError when the job server is lost, and queue.Empty after ``timeout_s``.
        """
        item = self._items.get(timeout=timeout_s)
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            self._items.put(asyncio.run(self._follow()))
        except BaseException as error:
            self._items.put(error)

    async def _follow(self) -> JobState:
        reads_left = _LAST_READS
        while True:
            try:
                complete = await self._read_log()
            except self._server.failures:
                complete = False
            state = self._state()
            if state is not None and state.ended:
                reads_left -= 1
                if complete or reads_left == 0:
                    self._put_text("\n" if self._partial else "")
                    return state
            await asyncio.sleep(_PAUSE_S)

    def _state(self) -> JobState | None:
        """The job's state, if the server answers. Raises RunError when it has been silent for too long."""
        try:
            state = self._server.state(self._id)
        except self._server.failures as error:
            if time.monotonic() - self._answered <= _LOST_S:
                return None
            raise RunError(
                f"the job server at {redacted(self._server.address)} is lost: {_brief(error)}. Job {self._id} may "
                "still be running; when the server answers again, the same command follows it"
            ) from None
        self._answered = time.monotonic()
        return state

    async def _read_log(self) -> bool:
        """Put the lines that are new; whether the stream came to its end. Raises one of the server's failures."""
        position = 0
        async for text in self._stream():
            if text is None:
                state = self._server.state(self._id)
                if state.ended:
                    return False
                self._items.put(state)
            else:
                fresh = text[max(0, self._seen - position) :]
                position += len(text)
                self._seen = max(self._seen, position)
                self._put_text(fresh)
            self._answered = time.monotonic()
        return True

    async def _stream(self) -> AsyncIterator[str | None]:
        """The log from its start, as it comes; None whenever it was silent for `_SILENCE_S`."""
        stream = self._server.client.tail_job_logs(self._id)
        try:
            while True:
                text = asyncio.ensure_future(anext(stream, None))
                try:
                    while not (await asyncio.wait({text}, timeout=_SILENCE_S))[0]:
                        yield None
                finally:
                    text.cancel()
                if (received := text.result()) is None:
                    return
                yield received
        finally:
            await stream.aclose()

    def _put_text(self, text: str) -> None:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._items.put(line)


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


def _brief(error: Exception) -> str:
    """The last line of an error: a job server answers with tracebacks."""
    lines = str(error).strip().splitlines()
    return one_line(lines[-1].rstrip(". ") if lines else type(error).__name__)
