"""rv submit end to end, on a cluster of this machine with a job server."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from job_cluster import Proxy, cpus_taken, end_of, environment, job_cluster

import rv_distributed as rv
from rv_distributed.demo import make_checkpoints
from rv_distributed.submission import Follower, JobRequest, JobServer, JobState, follow

RV = [sys.executable, "-m", "rv_distributed"]
SMALL = ["--max-shard-size", "1MB"]

# Ray's client gives aiohttp, for its default, a value that was the default once.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with job_cluster() as address:
            yield JobServer(address)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(str(folder))
    run([*transfer(folder, folder / "expected"), "--runtime", "local"])
    return folder


def transfer(models: Path, out: Path) -> list[str]:
    roles = [text for role in ("target", "donor", "reference") for text in (f"--{role}", str(models / role))]
    return ["transfer", *roles, "--alpha", "0.7", *SMALL, "--out", str(out)]


def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*RV, *argv], capture_output=True, text=True, timeout=200, env=environment(), stdin=subprocess.DEVNULL
    )


def submit(server: JobServer, *options: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    return run(["submit", "--address", server.address, *options, "--", *command])


def started(server: JobServer, *options: str, command: list[str]) -> subprocess.Popen[str]:
    argv = [*RV, "submit", "--address", server.address, *options, "--", *command]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def read_until(stream: IO[str] | None, wanted: str) -> str:
    """The first line that holds ``wanted``."""
    assert stream is not None
    for line in stream:
        if wanted in line:
            return line
    raise AssertionError(f"the stream ended without {wanted!r}")


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_command_runs_on_the_cluster_and_its_log_and_status_come_back(
    server: JobServer, models: Path, tmp_path: Path
) -> None:
    done = submit(server, command=transfer(models, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "out") == weights(models / "expected")
    assert len(weights(tmp_path / "out")) > 1
    assert "runtime  ray at" in done.stdout
    assert "% of the elements changed" in done.stdout
    assert "succeeded" in done.stderr
    assert "WebSocket" not in done.stderr


@pytest.mark.slow
def test_the_status_of_the_command_is_passed_through(server: JobServer, tmp_path: Path) -> None:
    done = submit(server, "--json", command=transfer(tmp_path / "missing", tmp_path / "out"))
    document = json.loads(done.stdout)
    assert done.returncode == 2
    assert (document["status"], document["driver_exit_code"], document["attached"]) == ("failed", 2, False)
    assert f"{tmp_path / 'missing' / 'target'}: " in done.stderr  # what rv said there
    again = submit(server, "--json", command=transfer(tmp_path / "missing", tmp_path / "out"))
    assert json.loads(again.stdout)["submission_id"] == document["submission_id"] + "-2"


@pytest.mark.slow
def test_a_difference_that_verify_finds_there_is_status_3(server: JobServer, models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "expected", tmp_path / "out")
    shard = next(iter(sorted((tmp_path / "out").glob("*.safetensors"))))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert submit(server, command=["rv", "verify", str(tmp_path / "out")]).returncode == 3


@pytest.mark.slow
def test_a_wheel_is_what_runs_there_and_a_failed_run_is_status_1(server: JobServer, tmp_path: Path) -> None:
    package = Path(rv.__file__).parent
    with zipfile.ZipFile(tmp_path / "rv_distributed-9-py3-none-any.whl", "w") as wheel:
        for path in package.rglob("*.py"):
            text = path.read_text()
            if path.name == "demo.py" and path.parent == package:
                text += "\n\ndef run_demo(folder):\n    raise __import__('rv_distributed').RunError('of the wheel')\n"
            wheel.writestr(str(path.relative_to(package.parent)), text)
    done = submit(server, "--wheel", wheel.filename or "", command=["demo", "--out", str(tmp_path / "demo")])
    assert done.returncode == 1
    assert "rv: of the wheel" in done.stdout


@pytest.mark.slow
def test_a_working_directory_goes_along(server: JobServer, models: Path, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    for role in ("target", "donor", "reference"):
        shutil.copytree(models / role, sent / role)
    done = submit(server, "--working-dir", str(sent), command=transfer(Path(), tmp_path / "out"))
    assert done.returncode == 0, done.stdout
    assert weights(tmp_path / "out") == weights(models / "expected")


@pytest.mark.slow
def test_a_job_that_cannot_be_set_up_is_status_1_with_the_reason(server: JobServer, tmp_path: Path) -> None:
    done = submit(server, "--image", "localhost/no-such-image", "--json", command=["inspect", str(tmp_path)])
    document = json.loads(done.stdout)
    assert done.returncode == 1
    assert (document["status"], document["driver_exit_code"]) == ("failed", None)
    assert "podman" in document["message"]
    assert f"job {document['submission_id']} failed: " in done.stderr


@pytest.mark.slow
def test_the_same_command_follows_the_same_job_and_an_interrupt_stops_it(
    server: JobServer, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    begin(models, out)
    with cpus_taken(server):
        first = started(server, "--json", command=transfer(models, out))
        name = read_until(first.stderr, "submitted job").split()[-1]
        other_order = ["transfer", "--out", str(out), *transfer(models, out)[1:-2]]
        second = started(server, command=other_order)
        assert f"job {name} does this already" in read_until(second.stderr, "rv: ")
        read_until(first.stderr, "runtime  ray")
        read_until(second.stdout, "runtime  ray")
        first.send_signal(signal.SIGINT)
        document = json.loads(first.communicate(timeout=120)[0])
        assert (first.returncode, document["status"], document["submission_id"]) == (130, "stopped", name)
        second.communicate(timeout=60)
        assert second.returncode == 143
    assert not out.exists()
    assert [job.submission_id for job in server.client.list_jobs() if job.submission_id.startswith(name)] == [name]

    resumed = submit(server, command=transfer(models, out))
    assert resumed.returncode == 0, resumed.stdout
    assert f"submitted job {name}-2" in resumed.stderr
    assert "pieces kept from an earlier run" in resumed.stdout
    assert weights(out) == weights(models / "expected")


def begin(models: Path, out: Path) -> None:
    """An unfinished run of the same command, with two pieces made."""

    def stop(progress: rv.Progress) -> None:
        if progress.pieces == 2:
            raise rv.Interrupted(signal.SIGINT)

    recipe = rv.Recipe(
        "transfer", str(models / "target"), (rv.Vector(str(models / "donor"), str(models / "reference")),), ((0.7,),)
    )
    options = rv.PlanOptions(max_shard_bytes=1_000_000)
    job = rv.prepare(recipe, [str(out)], options, rv.RunOptions(runtime="local", workers=1))
    with pytest.raises(rv.Interrupted):
        job.run(stop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "signum"), [(["--detach"], signal.SIGINT), ([], signal.SIGHUP)], ids=["detached", "terminal closed"]
)
def test_a_job_that_is_left_goes_on_and_can_be_followed_again(
    server: JobServer, models: Path, tmp_path: Path, more: list[str], signum: signal.Signals
) -> None:
    command = transfer(models, tmp_path / "out")
    with cpus_taken(server):
        submitted = submit(server, "--no-wait", command=command)
        name = submitted.stdout.strip()
        assert submitted.returncode == 0
        detached = started(server, *more, command=command)
        read_until(detached.stdout, "runtime  ray")
        detached.send_signal(signum)
        told = detached.communicate(timeout=60)[1]
        assert detached.returncode == 128 + signum
        assert f"job {name} goes on" in told
        assert server.state(name).status == "running"
        again = started(server, "--json", command=command)
        read_until(again.stderr, f"job {name} does this already")
    document = json.loads(again.communicate(timeout=120)[0])
    assert again.returncode == 0
    expected = {"status": "succeeded", "submission_id": name, "attached": True, "driver_exit_code": 0}
    assert {key: document[key] for key in expected} == expected
    assert weights(tmp_path / "out") == weights(models / "expected")


@pytest.mark.slow
def test_an_interrupt_stops_a_job_that_has_not_started(server: JobServer, models: Path, tmp_path: Path) -> None:
    with cpus_taken(server):
        waiting = started(server, "--entrypoint-num-cpus", "1", command=transfer(models, tmp_path / "out"))
        name = read_until(waiting.stderr, "submitted job").split()[-1]
        read_until(waiting.stderr, "to stop it")
        assert server.state(name).status == "pending"
        waiting.send_signal(signal.SIGTERM)
        assert f"job {name} has not started" in waiting.communicate(timeout=60)[1]
        assert waiting.returncode == 143
    assert end_of(server, name)[1].status == "stopped"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [Proxy.cut, Proxy.mute], ids=["cut", "mute"])
def test_a_stream_that_breaks_or_falls_silent_is_taken_up_where_it_was(
    disturb: Callable[[Proxy], None],
    server: JobServer,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Longer than the pauses that the server makes before it sends, or ends, the log of a job that has ended.
    monkeypatch.setattr(follow, "_SILENCE_S", 6.0)
    proxy = Proxy(int(server.address.rpartition(":")[2]))
    behind = JobServer(proxy.address)
    request = JobRequest(tuple(transfer(models, tmp_path / "out")), {"out": str(tmp_path)})
    lines: list[str] = []
    with cpus_taken(server):
        job, attached = behind.submit(request)
        assert not attached
        # As if another had submitted it just after this one looked.
        assert server._submit_as(job.submission_id, request)[1]
        follower = Follower(behind, job.submission_id)
        while not (lines and "free disk" in lines[-1]):
            item = follower.next(120)
            lines += [item] if isinstance(item, str) else []
        disturb(proxy)
    while not isinstance(item := follower.next(120), JobState) or not item.ended:
        lines += [item] if isinstance(item, str) else []
    proxy.close()
    assert item.exit_status == 0, lines
    assert lines == server.client.get_job_logs(job.submission_id).removesuffix("\n").split("\n")
    assert end_of(server, job.submission_id) == (lines, item)


@pytest.mark.slow
def test_a_lost_server_is_told(server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Proxy(int(server.address.rpartition(":")[2]))
    behind = JobServer(proxy.address)
    request = JobRequest(("inspect", str(tmp_path)), {})
    job, _ = behind.submit(request)
    proxy.close()
    monkeypatch.setattr(follow, "_LOST_S", 0.5)
    with pytest.raises(rv.RunError, match=rf"is lost.*{job.submission_id} may still be running"):
        end_of(behind, job.submission_id)
    assert end_of(server, job.submission_id)[1].exit_status == 2
