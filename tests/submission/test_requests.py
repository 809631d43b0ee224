"""What rv submit refuses before anything is sent, and how it names the work. No cluster is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import typer.main

from rv_distributed.cli.app import app
from rv_distributed.cli.submit import environment, parse_command
from rv_distributed.errors import UsageError
from rv_distributed.submission import JobRequest, JobServer, JobState

NOWHERE = "http://127.0.0.1:1"
TRANSFER = ["transfer", "--target", "/t", "--donor", "/d", "--reference", "/r", "--out", "/o"]


def parse(command: list[str]) -> JobRequest:
    context: Any = typer.main.get_command(app).make_context("rv", ["submit"])
    return JobRequest(*parse_command(context, command))


def submit(*args: str, script: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", f"{script}\nfrom rv_distributed.cli import main; main()", "submit", *args]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env={**environment, **(env or {})})


def test_the_same_work_has_the_same_name_however_it_is_written() -> None:
    request = parse(TRANSFER)
    assert request.submission_id.startswith("rv-transfer-")
    same = [
        ["rv", *TRANSFER],
        ["transfer", "--out", "/o", "--reference=/r", "--donor=/d", "--target=/t"],
        [*TRANSFER, "--alpha", "1.0"],
    ]
    assert {parse(command).submission_id for command in same} == {request.submission_id}


@pytest.mark.parametrize("more", [["--alpha", "0.5"], ["--out", "/p"], ["--workers", "2"], ["--overwrite"]])
def test_other_work_has_another_name(more: list[str]) -> None:
    assert parse([*TRANSFER, *more]).submission_id != parse(TRANSFER).submission_id


def test_other_code_has_another_name_and_another_reservation_has_not() -> None:
    arguments, parsed = parse(TRANSFER).arguments, parse(TRANSFER).parsed
    request = JobRequest(arguments, parsed)
    others = [
        JobRequest(arguments, parsed, wheel="/w.whl"),
        JobRequest(arguments, parsed, image="i"),
        JobRequest(arguments, parsed, working_dir="/d"),
    ]
    assert len({other.submission_id for other in [request, *others]}) == 4
    assert JobRequest(arguments, parsed, cpus=1, memory_bytes=0).submission_id == request.submission_id


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (TRANSFER, ["transfer", "--runtime", "ray", *TRANSFER[1:]]),
        ([*TRANSFER, "--runtime", "local"], [*TRANSFER, "--runtime", "local"]),
        ([*TRANSFER, "--runtime", "auto"], [*TRANSFER, "--runtime", "auto"]),
        (["rv", "verify", "/o"], ["verify", "/o"]),
    ],
    ids=["default", "local", "auto", "verify"],
)
def test_ray_is_asked_for_unless_the_command_names_a_runtime(command: list[str], arguments: list[str]) -> None:
    assert parse(command).arguments == tuple(arguments)


def test_the_command_line_there_is_quoted_for_its_shell() -> None:
    request = parse([*TRANSFER[:-1], "/o; rm 'x'", "--include", "a|b"])
    assert request.entrypoint.endswith("--out '/o; rm '\"'\"'x'\"'\"'' --include 'a|b'")
    assert request.entrypoint.startswith("python -m rv_distributed transfer ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--", "transfer", "--bad", "x"], "No such option: --bad"),
        (["--", "nonsense"], "No such command 'nonsense'"),
        (["--", "transfer", "--target", "/t"], "Missing option"),
        (["--", "submit", "--", "verify", "/o"], "cannot be submitted"),
        (["--", "rv"], "no command behind rv"),
        (["--", *TRANSFER[:-1], "out"], "give an absolute path"),
        (["--working-dir", "/missing", "--", *TRANSFER], "/missing is no folder"),
        (["--entrypoint-memory", "much", "--", *TRANSFER], "is not a size"),
        (["--", *TRANSFER], "no Ray job server answers at http://127.0.0.1:1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_is_refused_here_with_status_2(args: list[str], message: str) -> None:
    done = submit("--address", NOWHERE, *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_is_needed_and_that_of_a_variable_does_not_win() -> None:
    assert "--address" in submit("--", *TRANSFER).stderr
    by_variable = submit("--", *TRANSFER, env={"RAY_API_SERVER_ADDRESS": NOWHERE, "RAY_ADDRESS": "auto"})
    assert f"answers at {NOWHERE}" in by_variable.stderr
    chosen = submit("--address", NOWHERE, "--", *TRANSFER, env={"RAY_ADDRESS": "http://127.0.0.1:2"})
    assert f"answers at {NOWHERE}: Failed to connect to Ray at address: {NOWHERE}" in chosen.stderr


def test_an_address_that_is_no_url_is_refused_at_once() -> None:
    done = submit("--address", "head:6379", "--json", "--", *TRANSFER)
    assert done.returncode == 2
    assert "http://HEAD:8265" in json.loads(done.stdout)["error"]["message"]


def test_passwords_in_the_address_are_not_shown() -> None:
    done = submit("--address", "http://me:secret@127.0.0.1:1", "--json", "--", *TRANSFER)
    assert done.returncode == 2
    assert "secret" not in done.stdout + done.stderr


def test_a_missing_token_is_told_with_what_ray_says_of_it(tmp_path: Path) -> None:
    done = submit("--address", NOWHERE, "--", *TRANSFER, env={"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "no Ray job server" not in done.stderr


def test_the_remedy_is_named_where_rays_job_client_is_not_installed() -> None:
    done = submit("--address", NOWHERE, "--", *TRANSFER, script="import sys; sys.modules['aiohttp'] = None")
    assert done.returncode == 2
    assert "aiohttp is not installed: pip install 'ray[default]'" in done.stderr


class _NotFound(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _NotFound) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_that_is_none_of_rays_is_refused(other_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UsageError, match=r"no Ray job server answers.*404"):
        JobServer(other_server)


def test_only_wheels_of_ours_are_sent(tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/__init__.py", "")
    for wheel, message in ((other, "no wheel of rv_distributed"), (tmp_path / "missing.whl", "cannot be read")):
        with pytest.raises(UsageError, match=message), JobRequest(("demo",), {}, wheel=str(wheel)).runtime_env():
            pass


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("succeeded", 0, 0),
        ("failed", 3, 3),
        ("failed", -9, 137),
        ("failed", None, 1),
        ("stopped", None, 143),
    ],
)
def test_the_exit_status_of_a_job(status: str, code: int | None, expected: int) -> None:
    assert JobState("id", status, code, "").exit_status == expected


def test_the_commands_variables_go_along_and_those_of_submit_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RV_TRANSFER_ALPHA", "0.5")
    monkeypatch.setenv("RV_DTYPE", "float32")
    monkeypatch.setenv("RV_SUBMIT_WHEEL", "/x.whl")
    request = replace(parse(TRANSFER), environment=environment())
    with request.runtime_env() as env:
        sent = {name: value for name, value in env["env_vars"].items() if name.startswith("RV_")}
    assert sent == {"RV_TRANSFER_ALPHA": "0.5", "RV_DTYPE": "float32"}
    # What they say is part of the work.
    assert request.submission_id == parse([*TRANSFER, "--alpha", "0.5", "--dtype", "float32"]).submission_id
    monkeypatch.delenv("RV_DTYPE")
    assert request.submission_id != parse(TRANSFER).submission_id
