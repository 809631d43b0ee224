"""``rv submit``: another rv command as a job of a Ray cluster."""

from __future__ import annotations

import json as jsonlib
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperGroup

from rv_distributed.cli.options import Json
from rv_distributed.cli.terminal import say, warn
from rv_distributed.errors import Interrupted, UsageError, one_line, redacted
from rv_distributed.units import parse_bytes

if TYPE_CHECKING:
    from rv_distributed.submission import Follower, JobServer, JobState

Address = Annotated[
    str,
    typer.Option(
        help="Job server of the cluster: its dashboard.",
        metavar="URL",
        envvar=["RV_SUBMIT_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
    ),
]
Cpus = Annotated[
    float, typer.Option(help="CPUs to reserve for the driver; any keep it off a head that has none.", metavar="N")
]
Memory = Annotated[
    str,
    typer.Option(help="Memory to reserve for the driver; without it and CPUs, it runs on the head.", metavar="SIZE"),
]
WorkingDir = Annotated[
    str | None,
    typer.Option(help="Folder of small files to send along; without what .gitignore names.", metavar="PATH"),
]
Wheel = Annotated[
    str | None,
    typer.Option(help="Wheel of rv_distributed to use there; needs its dependencies there.", metavar="PATH"),
]
Image = Annotated[
    str | None, typer.Option(help="Container image for driver and workers; needs podman there.", metavar="URI")
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job's id once it is submitted, and stop.")]
Detach = Annotated[bool, typer.Option("--detach", help="Leave the job running when this command is interrupted.")]
Command = Annotated[list[str], typer.Argument(help="What to run there, for instance: transfer …", metavar="COMMAND")]

#: What an interrupted submit waits beyond the time that Ray gives the job to end.
_MORE_S = 15.0


def submit(
    context: typer.Context,
    command: Command,
    address: Address,
    entrypoint_num_cpus: Cpus = 0.0,
    entrypoint_memory: Memory = "512MiB",
    working_dir: WorkingDir = None,
    wheel: Wheel = None,
    image: Image = None,
    no_wait: NoWait = False,
    detach: Detach = False,
    json: Json = False,
) -> None:
    """Run an rv command as a job of a Ray cluster, show its log, and exit with its status.

    While a job with the same command has not ended, it is followed, and nothing is submitted. Ctrl-C stops the job.

    \b
    Example:
      rv submit --address http://head:8265 -- \\
        transfer --target /models/instruct --donor /models/grpo --reference /models/sft --out /models/out
    """
    arguments, parsed = parse_command(context, command)
    from rv_distributed.submission import JobRequest, JobServer

    request = JobRequest(
        arguments,
        parsed,
        entrypoint_num_cpus,
        parse_bytes(entrypoint_memory, "--entrypoint-memory"),
        _folder(working_dir),
        os.path.abspath(wheel) if wheel is not None else None,
        image,
        environment(),
    )
    server = JobServer(address)
    state, attached = server.submit(request)
    announcement = _announcement(server, state, attached)
    status = 0
    if no_wait:
        warn(announcement)
    else:
        state, status = _follow(server, state, announcement, detach=detach, show=warn if json else say)
    if json:
        say(jsonlib.dumps(_document(server, state, attached), indent=2))
    elif no_wait:
        say(state.submission_id)
    raise typer.Exit(status)


def parse_command(context: typer.Context, command: Sequence[str]) -> tuple[tuple[str, ...], dict[str, object]]:
    """The arguments to run on the cluster, and what they mean. Raises UsageError, or typer's own, for bad ones."""
    words = list(command[1:] if command[0] == "rv" else command)
    root = context.find_root()
    if not words:
        raise UsageError("there is no command behind rv")
    name, found, rest = cast(TyperGroup, root.command).resolve_command(root, words)
    if found is None or name == "submit":
        raise UsageError("a submit cannot be submitted; give the command that is to run")
    parsed = found.make_context(name, list(rest), parent=root)
    out = parsed.params.get("out")
    if out is not None and not os.path.isabs(out) and "://" not in out:
        raise UsageError(f"{out}: a job has a working directory of its own; give an absolute path")
    # In a job, auto takes Ray because RAY_ADDRESS is set there; this does not depend on it.
    source = parsed.get_parameter_source("runtime")
    chosen = ["--runtime", "ray"] if source is not None and source.name == "DEFAULT" else []
    return (words[0], *chosen, *rest), dict(parsed.params)


def environment() -> dict[str, str]:
    """The variables that the command reads its options from, there as here."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("RV_") and not name.startswith("RV_SUBMIT_")
    }


def _folder(working_dir: str | None) -> str | None:
    if working_dir is None:
        return None
    if not os.path.isdir(working_dir):
        raise UsageError(f"--working-dir: {working_dir} is no folder")
    return os.path.abspath(working_dir)


def _announcement(server: JobServer, state: JobState, attached: bool) -> str:
    name = state.submission_id
    what = f"job {name} does this already and is {state.status}; nothing was submitted"
    elsewhere = f"ray job stop --address {redacted(server.address)} {name}"
    return f"rv: {what if attached else f'submitted job {name}'}\nrv: to stop it from elsewhere: {elsewhere}"


def _follow(
    server: JobServer, state: JobState, announcement: str, *, detach: bool, show: Callable[[str], None]
) -> tuple[JobState, int]:
    """Show the log to the job's end, or to a signal. The last state known, and the exit status."""
    from rv_distributed.submission import STOP_WAIT_S, Follower

    name = state.submission_id
    follower = Follower(server, name)
    try:
        warn(announcement)
        state = _to_the_end(follower, show, None)
        status = state.exit_status
    except Interrupted as interrupted:
        status = interrupted.exit_status
        # A connection that is lost says nothing of the job.
        if detach or interrupted.signum == signal.SIGHUP:
            warn(f"rv: {interrupted}; job {name} goes on, and the same command follows it")
            return state, status
        warn(f"rv: {interrupted}; stopping job {name} (once more to leave at once)")
        state = server.stop(name)
        if state.status == "pending":
            warn(f"rv: job {name} has not started; it stops when it does")
            return state, status
        try:
            state = _to_the_end(follower, show, STOP_WAIT_S + _MORE_S)
        except queue.Empty:
            warn(f"rv: job {name} was asked to stop and has not done so yet; ray job status tells when it has")
            return state, status
        if state.status == "succeeded":
            status = 0
    if state.status == "failed" and state.driver_exit_code is None:
        warn(f"rv: job {name} failed: {one_line(state.message)}")
    elif state.status != "succeeded":
        warn(f"rv: job {name} {state.status}; exit status {status}")
    else:
        warn(f"rv: job {name} succeeded")
    return state, status


def _to_the_end(follower: Follower, show: Callable[[str], None], timeout_s: float | None) -> JobState:
    """Show what the follower gives, until the job has ended. Raises queue.Empty when that takes too long."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        item = follower.next(left)
        if isinstance(item, str):
            show(item)
        elif item.ended:
            return item
        elif item.status == "pending":
            warn(f"rv: job {item.submission_id} is pending: {one_line(item.message)}")


def _document(server: JobServer, state: JobState, attached: bool) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "status": state.status,
        "submission_id": state.submission_id,
        "attached": attached,
        "driver_exit_code": state.driver_exit_code,
        "message": state.message,
        "address": redacted(server.address),
    }
