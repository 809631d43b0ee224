"""Links: shards may lie anywhere; a small file that is copied must belong to the model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from refusal import ROLES, Done, assert_refused, make_models, run_rv, transfer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENIZER = b'{"model": {}}'


def cached(cache: Path, role: str, source: Path) -> Path:
    """The files of a folder as huggingface_hub lays them out: blobs, and a snapshot of links to them."""
    repository = cache / f"models--org--{role}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(source.rglob("*"))):
        if path.is_file():
            name = path.relative_to(source)
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            up = "../" * (len(name.parts) + 1)
            path.rename(repository / "blobs" / f"{number:064x}")
            (snapshot / name).symlink_to(f"{up}blobs/{number:064x}")
    return snapshot


@pytest.fixture
def models(tmp_path: Path) -> Path:
    models = make_models(tmp_path / "models")
    (models / "target" / "tokenizer.json").write_bytes(TOKENIZER)
    (models / "target" / "extra").mkdir()
    (models / "target" / "extra" / "code.py").write_text("raise SystemExit")
    return models


def run(snapshots: dict[str, Path], out: Path) -> Done:
    return run_rv(*arguments(snapshots, out))


def arguments(snapshots: dict[str, Path], out: Path) -> list[str | Path]:
    inputs: list[str | Path] = [text for role in ROLES for text in (f"--{role}", snapshots[role])]
    return ["transfer", *inputs, "--out", out, "--runtime", "local"]


@pytest.mark.parametrize("through", ["snapshot", "a link to the snapshot", "a link to the cache"])
def test_snapshots_of_a_hugging_face_cache_are_merged_with_their_small_files(
    models: Path, tmp_path: Path, through: str
) -> None:
    wanted = run_rv(*transfer(models, tmp_path / "plain"))
    assert wanted.status == 0
    snapshots = {role: cached(tmp_path / "hub", role, models / role) for role in ROLES}
    if through == "a link to the snapshot":
        (tmp_path / "model").symlink_to(snapshots["target"])
        snapshots["target"] = tmp_path / "model"
    if through == "a link to the cache":
        (tmp_path / "hub2").symlink_to(tmp_path / "hub")
        snapshots["target"] = tmp_path / "hub2" / snapshots["target"].relative_to(tmp_path / "hub")
    done = run(snapshots, tmp_path / "out")
    assert done.status == 0, done.stderr
    for name in ("model.safetensors", "config.json", "tokenizer.json", "extra/code.py"):
        copy = tmp_path / "out" / name
        assert not copy.is_symlink()
        assert copy.read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == TOKENIZER


def test_blobs_that_the_repositories_of_a_cache_share_belong_to_it(models: Path, tmp_path: Path) -> None:
    snapshots = {role: cached(tmp_path / "hub", role, models / role) for role in ROLES}
    shared = tmp_path / "hub" / "blobs" / "ab"
    shared.mkdir(parents=True)
    blob = (snapshots["target"] / "tokenizer.json").resolve()
    blob.rename(shared / blob.name)
    blob.symlink_to(f"../../blobs/ab/{blob.name}")
    refused = assert_refused(tmp_path, arguments(snapshots, tmp_path / "out"), "outside of the checkpoint")
    assert str(shared / blob.name) in refused.stderr
    (tmp_path / "hub" / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert run(snapshots, tmp_path / "out").status == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == TOKENIZER


def test_shards_are_followed_wherever_they_lead(models: Path, tmp_path: Path) -> None:
    assert run_rv(*transfer(models, tmp_path / "plain")).status == 0
    (tmp_path / "scratch").mkdir()
    for path in (models / "target").glob("*.safetensors"):
        path.rename(tmp_path / "scratch" / path.name)
        path.symlink_to(tmp_path / "scratch" / path.name)
    assert run_rv(*transfer(models, tmp_path / "out")).status == 0
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_a_small_file_may_be_a_link_inside_its_folder(models: Path, tmp_path: Path) -> None:
    (models / "target" / "chat_template.jinja").symlink_to("extra/code.py")
    assert run_rv(*transfer(models, tmp_path / "out")).status == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "raise SystemExit"


@pytest.mark.parametrize("how", ["by its path", "up and down again", "through another link"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "extra/code.py"])
def test_a_small_file_from_elsewhere_is_refused_by_name(models: Path, tmp_path: Path, name: str, how: str) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_text('{"PRIVATE": "KEY"}')
    path = models / "target" / name
    path.unlink()
    if how == "through another link":
        (models / "target" / "pytorch_model.bin").symlink_to(secret)
        path.symlink_to(models / "target" / "pytorch_model.bin")
    else:
        path.symlink_to(secret if how == "by its path" else os.path.relpath(secret, path.parent))
    told = f"{path}: is a link to {secret}, outside of the checkpoint, and would be copied into the output. "
    assert_refused(tmp_path, transfer(models, tmp_path / "out"), (told, "Put the file itself there"))


def test_a_small_file_from_another_model_of_the_cache_is_refused(models: Path, tmp_path: Path) -> None:
    snapshots = {role: cached(tmp_path / "hub", role, models / role) for role in ROLES}
    path = snapshots["target"] / "tokenizer.json"
    path.unlink()
    blob = (snapshots["donor"] / "config.json").resolve()
    path.symlink_to(f"../../../models--org--donor/blobs/{blob.name}")
    told = (f"{path}: is a link to {blob}, outside of the checkpoint", "else remove it.")
    assert_refused(tmp_path, arguments(snapshots, tmp_path / "out"), told)


def test_blobs_that_lead_out_of_the_cache_are_refused(models: Path, tmp_path: Path) -> None:
    snapshots = {role: cached(tmp_path / "hub", role, models / role) for role in ROLES}
    blobs = tmp_path / "hub" / "models--org--target" / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    path = snapshots["target"] / "tokenizer.json"
    told = f"{path}: is a link to {tmp_path / 'elsewhere'}"
    assert_refused(tmp_path, arguments(snapshots, tmp_path / "out"), told)


def test_small_files_of_a_donor_are_not_copied_so_they_may_lie_anywhere(models: Path, tmp_path: Path) -> None:
    (models / "donor" / "tokenizer.json").unlink(missing_ok=True)
    (tmp_path / "tokenizer.json").write_bytes((models / "target" / "tokenizer.json").read_bytes())
    (models / "donor" / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    assert run_rv(*transfer(models, tmp_path / "out")).status == 0


def test_a_missing_blob_is_named_by_the_link_to_it(models: Path, tmp_path: Path) -> None:
    snapshots = {role: cached(tmp_path / "hub", role, models / role) for role in ROLES}
    blob = (snapshots["target"] / "tokenizer.json").resolve()
    blob.unlink()
    told = f"{snapshots['target'] / 'tokenizer.json'}: is a link to ../../blobs/{blob.name}, where no file can be"
    assert_refused(tmp_path, arguments(snapshots, tmp_path / "out"), told)
