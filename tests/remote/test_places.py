"""Places for outputs in object stores: what is tried before a run, and what a run leaves and finds there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from refusal import run_rv
from servers.proxy import Proxy, proxy_to
from servers.stores import BUCKET, StoreServer, s3_client, unfinished_uploads

from remote.checkpoints import NUMBERS, OPTIONS, comparable, content_of, keys_below, s3_roles
from rv_distributed.checkpoint.manifest import MANIFEST_FILE
from rv_distributed.errors import OutputError, RunError
from rv_distributed.staging import noted, open_staging
from rv_distributed.storage import lease, open_store


def transfer(server: StoreServer, folder: str, out: str, *more: str) -> list[str]:
    return ["transfer", *s3_roles(server, folder), "--alpha", "0.7", "--out", out, *OPTIONS, *more]


@pytest.fixture
def out(s3: StoreServer) -> str:
    return s3.uri(f"place-{next(NUMBERS)}")


def sends_second_shard(method: str, path: str) -> bool:
    return method == "PUT" and "model-00002" in path and "partNumber=2" in path


def test_a_run_that_fails_leaves_no_parts_and_is_resumed(
    s3: StoreServer, in_s3: str, out: str, wanted: dict[str, bytes]
) -> None:
    with proxy_to(s3.port) as proxy:
        through = s3.uri(out.partition(f"{BUCKET}/")[2].partition("?")[0], proxy.port)
        proxy.trouble = lambda method, path: "403" if sends_second_shard(method, path) else None
        failed = run_rv(*transfer(s3, in_s3, through))
        assert failed.status == 1
        assert "model-00002-of-00002.safetensors" in failed.stderr
        assert "access denied" in failed.stderr
        assert unfinished_uploads(s3.port) == []
        assert MANIFEST_FILE not in keys_below(out)
        assert ".rv/records/000000" in keys_below(out)
        state = json.loads(content(out, ".rv/progress.json"))
        assert (state["state"], state["pieces"]) == ("stopped", 1)
        proxy.trouble, proxy.seen = lambda *_: None, []
        done = run_rv(*transfer(s3, in_s3, through))
        assert done.status == 0, done.stderr
        assert "1 of 2 pieces kept from an earlier run" in done.stdout
        assert not [path for method, path, *_ in proxy.seen if method == "PUT" and "model-00001" in path]
    assert comparable(content_of(out)) == wanted
    assert not [name for name in keys_below(out) if name.startswith(".rv/")]


def test_a_shard_that_was_replaced_is_made_again(
    s3: StoreServer, in_s3: str, out: str, wanted: dict[str, bytes]
) -> None:
    with failing_run(s3, in_s3, out):
        store, key = open_store(out)
        store.put(f"{key}/model-00001-of-00002.safetensors", b"something else")
    done = run_rv(*transfer(s3, in_s3, out))
    assert done.status == 0, done.stderr
    assert "pieces kept" not in done.stdout
    assert comparable(content_of(out)) == wanted


def test_another_command_is_refused_until_it_restarts(s3: StoreServer, in_s3: str, out: str) -> None:
    with failing_run(s3, in_s3, out):
        pass
    other = [*transfer(s3, in_s3, out), "--exclude", "norm"]
    # The second shard may fail before the first one is finished.
    is_noted = ".rv/records/000000" in keys_below(out)
    planned = run_rv(*transfer(s3, in_s3, out), "--dry-run").stdout
    assert ("resumes  1 of 2 pieces is there" in planned) == is_noted
    assert run_rv(*other, "--dry-run").status == 2
    refused = run_rv(*other)
    assert refused.status == 2
    assert (
        "an unfinished run was begun with other inputs, options or versions (--exclude: then not given, now norm)"
        in refused.stderr
    )
    assert run_rv(*other, "--restart").status == 0


def test_an_output_is_replaced_whole(s3: StoreServer, in_s3: str, out: str, wanted: dict[str, bytes]) -> None:
    one_shard = transfer(s3, in_s3, out, "--max-shard-size", "1GB")
    assert run_rv(*one_shard).status == 0
    assert "model.safetensors" in keys_below(out)
    refused = run_rv(*transfer(s3, in_s3, out))
    assert refused.status == 2
    assert "already exists, made with other" in refused.stderr
    assert "(--max-shard-size: then 1000000000, now " in refused.stderr
    store, key = open_store(out)
    store.put(f"{key}/mine/notes.txt", b"precious")
    store.put(f"{key}/mine/", b"")
    refused = run_rv(*transfer(s3, in_s3, out, "--overwrite"))
    assert refused.status == 2
    assert "--overwrite would delete: mine/notes.txt. Move that away" in refused.stderr
    assert "mine/notes.txt" in keys_below(out)
    store.delete([f"{key}/mine/notes.txt"])
    done = run_rv(*transfer(s3, in_s3, out, "--overwrite"))
    assert done.status == 0, done.stderr
    assert comparable(content_of(out)) == wanted
    assert run_rv("verify", out).status == 0


def test_what_comes_into_the_older_output_during_the_run_is_kept(
    s3: StoreServer, in_s3: str, out: str, wanted: dict[str, bytes]
) -> None:
    assert run_rv(*transfer(s3, in_s3, out, "--max-shard-size", "1GB")).status == 0
    store, key = open_store(out)

    def come(method: str, path: str) -> None:
        if sends_second_shard(method, path):
            store.put(f"{key}/mine/notes.txt", b"precious")

    with proxy_to(s3.port) as proxy:
        proxy.trouble = come
        through = s3.uri(key, proxy.port)
        stopped = run_rv(*transfer(s3, in_s3, through, "--overwrite"))
    assert stopped.status == 2
    assert "holds what is not of the output: mine/notes.txt. Move that away" in stopped.stderr
    assert content(out, "mine/notes.txt") == b"precious"
    assert MANIFEST_FILE not in keys_below(out)
    store.delete([f"{key}/mine/notes.txt"])
    done = run_rv(*transfer(s3, in_s3, out, "--overwrite"))
    assert done.status == 0, done.stderr
    assert "2 of 2 pieces kept from an earlier run" in done.stdout
    assert comparable(content_of(out)) == wanted


@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["first", "overwriting"])
def test_what_comes_between_a_stopped_run_and_the_next_one_is_kept(
    s3: StoreServer, in_s3: str, out: str, wanted: dict[str, bytes], more: list[str]
) -> None:
    if more:
        assert run_rv(*transfer(s3, in_s3, out, "--max-shard-size", "1GB")).status == 0
    with failing_run(s3, in_s3, out, *more):
        store, key = open_store(out)
        store.put(f"{key}/eval/results.json", b"precious")
        store.put(f"{key}/eval/", b"")
    there = keys_below(out)
    refused = run_rv(*transfer(s3, in_s3, out, *more))
    assert refused.status == 2
    assert "holds what is not of the output: eval/results.json. Move that away" in refused.stderr
    assert keys_below(out) == there
    store.delete([f"{key}/eval/results.json"])
    done = run_rv(*transfer(s3, in_s3, out, *more))
    assert done.status == 0, done.stderr
    assert comparable(content_of(out)) == wanted


def test_what_runs_made_before_a_restart_goes_with_it(s3: StoreServer, in_s3: str, out: str) -> None:
    """The older output's shards, too, which no manifest tells any more."""
    assert run_rv(*transfer(s3, in_s3, out, "--max-shard-size", "15MB")).status == 0
    with failing_run(s3, in_s3, out, "--overwrite"):
        pass
    done = run_rv(*transfer(s3, in_s3, out, "--max-shard-size", "1GB", "--overwrite", "--restart"))
    assert done.status == 0, done.stderr
    assert {name for name in keys_below(out) if ".safetensors" in name} == {"model.safetensors"}


def test_a_note_that_cannot_be_read_can_be_thrown_away(
    s3: StoreServer, in_s3: str, out: str, wanted: dict[str, bytes]
) -> None:
    with failing_run(s3, in_s3, out):
        store, key = open_store(out)
        store.put(f"{key}/.rv/plan.json", b"rot")
    refused = run_rv(*transfer(s3, in_s3, out))
    assert refused.status == 2
    assert "Give --restart" in refused.stderr
    done = run_rv(*transfer(s3, in_s3, out, "--restart"))
    assert done.status == 0, done.stderr
    assert comparable(content_of(out)) == wanted


def test_a_killed_run_leaves_its_parts_to_the_next_one(
    s3: StoreServer, in_s3: str, out: str, wanted: dict[str, bytes]
) -> None:
    """Its lock, too: the process that held it is no more, which is seen at once on the same machine."""
    with proxy_to(s3.port) as proxy:
        through = s3.uri(out.partition(f"{BUCKET}/")[2].partition("?")[0], proxy.port)
        proxy.trouble = lambda method, path: "hang" if sends_second_shard(method, path) else None
        argv = [sys.executable, "-m", "rv_distributed", *transfer(s3, in_s3, through)]
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            until = time.monotonic() + 60
            while not (proxy.hanging.is_set() and ".rv/records/000000" in keys_below(out)):
                assert time.monotonic() < until
                time.sleep(0.05)
            second = run_rv(*transfer(s3, in_s3, out))
            assert second.status == 2
            assert f"another run is writing it (process {run.pid} on " in second.stderr
            run.send_signal(signal.SIGKILL)
            run.wait()
        proxy.trouble = lambda *_: None
        proxy.release.set()
    assert len(unfinished_uploads(s3.port)) == 1
    began = time.monotonic()
    done = run_rv(*transfer(s3, in_s3, out))
    assert done.status == 0, done.stderr
    assert time.monotonic() - began < lease.STILL_S
    assert "1 of 2 pieces kept" in done.stdout
    assert unfinished_uploads(s3.port) == []
    assert comparable(content_of(out)) == wanted


def test_a_holder_of_another_machine_is_waited_for(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STILL_S", 0.5)
    store, key = open_store(out)
    store.put(f"{key}/.rv/lock.json", json.dumps({"kernel": "other", "token": "x", "beat": 1, "pid": 7}).encode())
    staging = open_staging(out, {"a": 1}, overwrite=False, restart=False)
    assert json.loads(content(out, ".rv/lock.json"))["pid"] == os.getpid()
    staging.close()
    assert ".rv/lock.json" not in keys_below(out)


def test_a_holder_that_lives_keeps_its_place(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr("rv_distributed.storage.object_lease._is_dead", lambda _: False)
    staging = open_staging(out, {"a": 1}, overwrite=False, restart=False)
    with pytest.raises(OutputError, match="another run is writing it"):
        open_staging(out, {"a": 1}, overwrite=False, restart=False)
    staging.close()


def test_a_holder_that_was_taken_over_publishes_nothing(out: str) -> None:
    staging = open_staging(out, {"a": 1}, overwrite=False, restart=False)
    store, key = open_store(out)
    store.put(f"{key}/.rv/lock.json", json.dumps({"token": "of another"}).encode())
    with pytest.raises(RunError, match="took the place over"):
        staging.publish(b"{}")
    staging.close()
    assert MANIFEST_FILE not in keys_below(out)
    assert ".rv/lock.json" in keys_below(out)


def test_of_two_runs_only_one_can_win(out: str) -> None:
    """The manifest is made where there is none, whatever happened before."""
    staging = open_staging(out, {"a": 1}, overwrite=False, restart=False)
    store, key = open_store(out)
    store.put(f"{key}/{MANIFEST_FILE}", b'{"of": "another"}')
    with pytest.raises(OutputError, match="was made by another run meanwhile"):
        staging.publish(b"{}")
    staging.close()
    assert content(out, MANIFEST_FILE) == b'{"of": "another"}'


def test_what_another_run_has_just_published_is_not_taken_for_an_unfinished_one(out: str) -> None:
    """It has let go of the place, and not cleaned up yet."""
    staging = open_staging(out, {"a": 1}, overwrite=False, restart=False)
    staging.publish(b"{}")
    staging.close()
    with pytest.raises(OutputError, match="already exists"):
        open_staging(out, {"a": 1}, overwrite=False, restart=False)
    assert content(out, MANIFEST_FILE) == b"{}"
    assert ".rv/plan.json" in keys_below(out)
    assert ".rv/lock.json" not in keys_below(out)


def test_a_folder_marker_among_the_records_is_no_record(out: str) -> None:
    open_staging(out, {"a": 1}, overwrite=False, restart=False).close()
    store, key = open_store(out)
    for name in ("", "000007"):
        store.put(f"{key}/.rv/records/{name}", b"")
    assert noted(out, {"a": 1}) == {7}


def test_what_is_wrong_with_a_place_is_found_before_the_run_with_all_else(
    s3: StoreServer, in_s3: str, out: str
) -> None:
    with proxy_to(s3.port) as proxy:
        through = s3.uri(out.partition(f"{BUCKET}/")[2].partition("?")[0], proxy.port)
        proxy.trouble = lambda method, _path: "403" if method == "PUT" else None
        command = ["transfer", "--target", s3.uri(f"{in_s3}/target"), "--donor", s3.uri("nowhere")]
        command += ["--reference", s3.uri(f"{in_s3}/reference"), "--out", through, *OPTIONS]
        done = run_rv(*command)
        assert done.status == 2
        assert "2 problems with the inputs" in done.stderr
        assert "nowhere" in done.stderr
        assert "cannot be written to: access denied" in done.stderr
        assert keys_below(out) == set()


def test_stores_that_cannot_be_opened_are_told_with_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    inputs = ["--target", "s3://unopened/a", "--donor", "gs://unopened/b", "--reference", str(tmp_path / "none")]
    done = run_rv("transfer", *inputs, "--out", "gs://unopened/out", *OPTIONS)
    assert done.status == 2
    assert "4 problems with the inputs" in done.stderr
    for place, what in (
        ("s3://unopened/a: cannot be listed", "profile (nobody)"),
        ("gs://unopened/b: cannot be listed", "no Google credentials"),
        ("/none: does not exist", ""),
        ("gs://unopened/out: cannot be written to", "no Google credentials"),
    ):
        assert any(place in line and what in line for line in done.stderr.splitlines()), (place, done.stderr)
    assert run_rv("verify", "gs://unopened/b").status == 2


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("s3://nobucket/out", "the bucket does not exist"),
        (f"s3://{BUCKET}", "is a whole bucket"),
        (f"s3://{BUCKET}/in/target/out", "overlap"),
        (f"s3://{BUCKET}/in", "overlap"),
        (f"s3://{BUCKET}/foreign", "holds objects that are no output of rv"),
    ],
)
def test_places_that_cannot_be_are_refused(s3: StoreServer, in_s3: str, place: str, what: str) -> None:
    s3_client(s3.port).put_object(Bucket=BUCKET, Key="foreign/thesis.pdf", Body=b"x")
    done = run_rv(*transfer(s3, in_s3, f"{place}?{s3.uri('').partition('?')[2]}", "--overwrite"))
    assert done.status == 2
    assert what in done.stderr


@pytest.mark.parametrize(("more", "status", "tries"), [(["--dry-run"], 0, False), (["--donor", "nowhere"], 2, True)])
def test_a_trial_leaves_nothing_and_a_dry_run_does_without(
    s3: StoreServer, in_s3: str, out: str, more: list[str], status: int, tries: bool
) -> None:
    with proxy_to(s3.port) as proxy:
        through = s3.uri(out.partition(f"{BUCKET}/")[2].partition("?")[0], proxy.port)
        done = run_rv(*transfer(s3, in_s3, through, *more))
        assert done.status == status, done.stderr
        assert any(request.method not in ("GET", "HEAD") for request in proxy.seen) == tries
    assert keys_below(out) == set()


def test_what_cannot_be_done_with_uris_is_said(s3: StoreServer) -> None:
    for command in (["bench", s3.uri("x")], ["push", s3.uri("x"), "org/name"]):
        done = run_rv(*command)
        assert done.status == 2
        assert "only" in done.stderr


def content(uri: str, name: str) -> bytes:
    store, key = open_store(uri)
    got = bytearray()
    store.fetch(f"{key}/{name}", 0, None, got.extend)
    return bytes(got)


@contextmanager
def failing_run(server: StoreServer, folder: str, out: str, *more: str) -> Iterator[Proxy]:
    """An unfinished run at ``out``, with one shard of two."""
    with proxy_to(server.port) as proxy:
        through = server.uri(out.partition(f"{BUCKET}/")[2].partition("?")[0], proxy.port)
        proxy.trouble = lambda method, path: "403" if sends_second_shard(method, path) else None
        assert run_rv(*transfer(server, folder, through, *more)).status == 1
        yield proxy
