"""Whole runs whose inputs and outputs lie in object stores and on the Hub, against the same run on local folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusal import run_rv
from servers.hub import TOKEN, hub_server
from servers.stores import S3_SECRETS, StoreServer, unfinished_uploads

from remote.checkpoints import (
    NUMBERS,
    OPTIONS,
    comparable,
    content_of,
    files_of,
    keys_below,
    roles,
    run_with_hub,
    s3_roles,
)
from rv_distributed.checkpoint.uris import join, last_part
from rv_distributed.storage import open_folder


def test_a_transfer_from_s3_to_s3_makes_the_bytes_of_a_local_one(
    s3: StoreServer, in_s3: str, wanted: dict[str, bytes]
) -> None:
    out = s3.uri(f"out-{next(NUMBERS)}")
    command = ["transfer", *s3_roles(s3, in_s3), "--alpha", "0.7", "--out", out, *OPTIONS]
    done = run_rv(*command)
    assert done.status == 0, done.stderr
    assert comparable(content_of(out)) == wanted
    assert not any(name.startswith(".rv/") for name in keys_below(out))
    assert unfinished_uploads(s3.port) == []
    assert run_rv("verify", out).status == 0
    assert run_rv("verify", out, "--against-inputs").status == 0
    again = run_rv(*command)
    assert again.status == 0
    assert "up to date" in again.stdout


def test_a_stored_vector_and_a_sweep_go_through_stores(s3: StoreServer, in_s3: str, wanted: dict[str, bytes]) -> None:
    vector, out = (s3.uri(f"{what}-{next(NUMBERS)}") for what in ("vector", "sweep"))
    donor, reference = (s3.uri(f"{in_s3}/{role}") for role in ("donor", "reference"))
    assert run_rv("extract", "--donor", donor, "--reference", reference, "--out", vector, *OPTIONS).status == 0
    template = out.replace("?", "-{alpha}?")
    target = s3.uri(f"{in_s3}/target")
    command = ["apply", "--target", target, "--vector", vector, "--alpha", "0.7,1", "--out", template, *OPTIONS]
    done = run_rv(*command)
    assert done.status == 0, done.stderr
    assert comparable(content_of(template.replace("{alpha}", "0.7"))) == wanted
    assert comparable(content_of(template.replace("{alpha}", "1"))) != wanted


def test_an_output_in_a_store_is_made_again_of_its_recipe_and_compared(
    s3: StoreServer,
    in_s3: str,
    models: Path,
    wanted: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = s3.uri(f"out-{next(NUMBERS)}")
    assert run_rv("transfer", *s3_roles(s3, in_s3), "--alpha", "0.7", "--out", out, *OPTIONS).status == 0
    recipe = join(out, "rv_recipe.yaml")
    assert json.loads(run_rv("recipe", "check", recipe, "--json").stdout)["target"] == s3.uri(f"{in_s3}/target")
    again = tmp_path / "again"
    done = run_rv("run", recipe, "--out", again)
    assert done.status == 0, done.stderr
    assert comparable({p.relative_to(again).as_posix(): p.read_bytes() for p in files_of(again)}) == wanted
    assert run_rv("diff", out, again, "--exit-code", "--quiet").status == 0
    assert run_rv("diff", out, models / "target", "--exit-code", "--quiet").status == 3
    assert "cannot be read" in run_rv("recipe", "check", join(out, "none.yaml")).stderr
    monkeypatch.chdir(tmp_path)
    assert run_rv("report", out, "--format", "md").status == 0
    assert list(tmp_path.glob("*.report.md")) == [tmp_path / f"{last_part(out)}.report.md"]


def test_stores_and_folders_mix_in_one_command(
    s3: StoreServer, gcs: StoreServer, in_s3: str, models: Path, wanted: dict[str, bytes], tmp_path: Path
) -> None:
    out = gcs.uri("mixed")
    with hub_server() as hub:
        files = {
            path.relative_to(models / "target").as_posix(): path.read_bytes() for path in files_of(models / "target")
        }
        commit = hub.put("org/target", files, private=True)
        command = ["transfer", "--target", "org/target", "--donor", s3.uri(f"{in_s3}/donor")]
        command += ["--reference", str(models / "reference"), "--alpha", "0.7", "--out", out, *OPTIONS, "--json"]
        done = run_with_hub(hub, tmp_path, *command)
        assert done.returncode == 0, done.stderr
        manifest = json.loads(done.stdout)["outputs"][0]["manifest"]
        told = [(entry["role"], entry["uri"], entry["revision"]) for entry in manifest["inputs"]]
        assert told == [
            ("target", f"hf://org/target@{commit}", commit),
            ("donor", s3.uri(f"{in_s3}/donor"), None),
            ("reference", str(models / "reference"), None),
        ]
        assert comparable(content_of(out)) == wanted
        card = open_folder(out).read("README.md").decode()
        assert "- org/target\n" in card
        assert "- donor\n" in card
        checked = run_with_hub(hub, tmp_path, "verify", out, "--against-inputs")
        assert checked.returncode == 0, checked.stderr
        assert hub.leaked == []
        secrets = (TOKEN, S3_SECRETS["AWS_SECRET_ACCESS_KEY"])
        assert not [name for name, data in content_of(out).items() for secret in secrets if secret.encode() in data]


def test_an_output_goes_to_the_hub(models: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    with hub_server() as hub:
        command = ["transfer", *roles(models), "--alpha", "0.7", "--out", "hf://ada/made", *OPTIONS]
        hub.broken_uploads = 1
        failed = run_with_hub(hub, tmp_path, *command)
        assert failed.returncode == 1
        assert "hf://ada/made: the upload failed" in failed.stderr
        done = run_with_hub(hub, tmp_path, *command)
        assert done.returncode == 0, done.stderr
        assert "up to date" in done.stdout
        assert "\nhf://ada/made\n" in done.stdout
        repo = hub.repos["ada/made"]
        there = repo.commits[repo.refs["main"]]
        assert comparable({name: data for name, data in there.items() if name != ".gitattributes"}) == wanted
        assert repo.private
        assert not any(tmp_path.glob("ada--made*"))
        denied = run_with_hub(
            hub, tmp_path, *["hf://bob/made" if word == "hf://ada/made" else word for word in command]
        )
        assert denied.returncode == 2
        assert "ada is no member of bob" in denied.stderr
