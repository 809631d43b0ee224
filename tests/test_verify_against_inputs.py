"""`rv verify --against-inputs`: an output is computed again from what its manifest names, by the real command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from reference import Raw, weights, write_checkpoint

import rv_distributed as rv
from rv_distributed.checkpoint.manifest import manifest_from
from rv_distributed.checkpoint.table import PartDigest, read_table, shard_digest, write_table

RV = [sys.executable, "-c", "from rv_distributed.cli import main; main()"]
SHAPES = {"a": (3000, 501), "b": (77,), "c": (1200, 900), "empty": (0, 3), "scalar": (), "d": (64, 64)}
HOW = rv.RunOptions(runtime="local", workers=2)
PLAN = rv.PlanOptions(max_shard_bytes=3_000_000)


def command(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RV, *map(str, args)], capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, two vectors, and outputs of every operation."""
    root, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(11)
    for role, dtype in (("target", "BF16"), ("donor", "BF16"), ("reference", "F16")):
        tensors = {name: weights(rng, dtype, shape) for name, shape in SHAPES.items()}
        write_checkpoint(root / role, tensors | {"ids": Raw("I64", (9,), rng.bytes(72))})
    target, donor, reference = (str(root / role) for role in ("target", "donor", "reference"))
    rv.extract(donor, reference, str(root / "vector"), plan_options=PLAN, run_options=HOW)
    bf16 = rv.PlanOptions(dtype="bfloat16")
    rv.extract(donor, target, str(root / "second"), plan_options=bf16, run_options=HOW)
    pairs = [(str(root / "vector"), 0.5), (str(root / "second"), -0.3)]
    rv.apply(target, pairs, str(root / "applied"), plan_options=PLAN, run_options=HOW)
    f32 = rv.PlanOptions(dtype="float32", exclude="^c$")
    rv.transfer(target, donor, reference, str(root / "cast"), alpha=0.7, plan_options=f32, run_options=HOW)
    inputs = ("--target", target, "--donor", donor, "--reference", reference)
    done = command("transfer", *inputs, "--alpha", "0,0.4,1", "--out", root / "swept-{alpha}", "--runtime", "local")
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """A fresh copy of everything, whose manifests and recipes name the copies of the inputs."""
    root = Path(shutil.copytree(made, tmp_path / "models"))
    for path in root.glob("*/rv_manifest.json"):
        document = json.loads(path.read_bytes().replace(str(made).encode(), str(root).encode()))
        recipe = path.with_name("rv_recipe.yaml").read_bytes().replace(str(made).encode(), str(root).encode())
        path.with_name("rv_recipe.yaml").write_bytes(recipe)
        for file in document["files"]:
            if file["name"] == "rv_recipe.yaml":
                file |= {"bytes": len(recipe), "digest": blake3(recipe).hexdigest()}
        path.write_bytes(manifest_from(document).sealed().to_json())
    return root


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


@pytest.mark.parametrize("name", ["vector", "second", "applied", "cast", "swept-0", "swept-0.4", "swept-1"])
def test_an_untouched_output_is_what_its_inputs_give(made: Path, name: str) -> None:
    done = command("verify", made / name, "--against-inputs", "--json")
    assert done.returncode == 0, done.stderr
    recomputed = json.loads(done.stdout)["recomputed"]
    assert recomputed["bytes"] == sum(path.stat().st_size for path in (made / name).glob("*.safetensors"))
    assert recomputed["pieces"] == recomputed["pieces_total"] > 0


def test_it_says_what_it_did_to_people(made: Path) -> None:
    done = command("verify", made / "vector", "--against-inputs", "--sample", "0.01")
    assert done.returncode == 0, done.stderr
    assert "all as written" in done.stdout
    assert "1 of 4 pieces" in done.stdout
    assert "computed again from the inputs: the same bits" in done.stdout


def test_a_sample_is_the_same_pieces_every_time(made: Path) -> None:
    documents = []
    for _ in range(2):
        done = command("verify", made / "vector", "--against-inputs", "--sample", "0.5", "--json")
        documents.append(json.loads(done.stdout)["recomputed"])
    assert documents[0] == documents[1]
    assert (documents[0]["pieces"], documents[0]["pieces_total"]) == (2, 4)


@pytest.mark.parametrize(
    "args",
    [("--sample", "0.5"), *(("--against-inputs", "--sample", share) for share in ("0", "1.5", "nan", "-1"))],
)
def test_a_share_that_makes_no_sense_is_refused(made: Path, args: tuple[str, ...]) -> None:
    done = command("verify", made / "vector", *args)
    assert done.returncode == 2
    assert "--sample" in done.stderr


@pytest.mark.parametrize(
    ("output", "role", "tensor"),
    [
        ("vector", "reference", "a"),
        ("applied", "target", "c"),
        ("applied", "second", "a"),
        ("swept-0.4", "donor", "c"),
        ("cast", "target", "c"),
    ],
)
def test_an_input_changed_behind_its_fingerprint_is_a_difference(
    models: Path, output: str, role: str, tensor: str
) -> None:
    """The last element, far from the sample in the middle of the file that the fingerprint holds."""
    source = rv.open_checkpoint(str(models / role))
    changed = source.tensors[tensor]
    element = changed.stop - (4 if changed.dtype == "F32" else 2)
    flip(models / role / changed.file, element + (changed.stop - element - 1))
    assert rv.open_checkpoint(str(models / role)).fingerprint == source.fingerprint
    done = command("verify", models / output, "--against-inputs", "--json")
    assert done.returncode == 3, done.stderr
    document = json.loads(done.stdout)
    (finding,) = document["findings"]
    of = rv.open_checkpoint(str(models / output)).tensors[tensor]
    item = 4 if of.dtype == "F32" else 2
    assert (finding["file"], finding["tensor"]) == (of.file, tensor)
    assert of.stop - item <= finding["start"] < finding["stop"] <= of.stop
    assert "inputs" in finding["what"]


def test_an_output_forged_together_with_its_digests_is_a_difference(models: Path) -> None:
    """Everything in the folder agrees; only the inputs can tell."""
    out = models / "vector"
    manifest = manifest_from(json.loads((out / "rv_manifest.json").read_bytes()))
    rows = read_table((out / "rv_tensors.parquet").read_bytes())
    number = next(number for number, row in enumerate(rows) if row.name == "c")
    row = rows[number]
    flip(out / row.shard, row.start + 1234)
    raw = (out / row.shard).read_bytes()
    digest = blake3(raw[row.start : row.stop]).hexdigest()
    assert len(row.parts) == 1
    rows[number] = row._replace(digest=digest, parts=(PartDigest(row.start, row.stop, digest),))
    table = write_table(rows)
    (out / "rv_tensors.parquet").write_bytes(table)
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    parts = [part.digest for each in rows if each.shard == row.shard for part in each.parts]
    document: dict[str, Any] = json.loads(manifest.to_json())
    for shard in document["shards"]:
        if shard["name"] == row.shard:
            shard["digest"] = shard_digest(header, parts)
    for file in document["files"]:
        if file["name"] == "rv_tensors.parquet":
            file |= {"bytes": len(table), "digest": blake3(table).hexdigest()}
    (out / "rv_manifest.json").write_bytes(manifest_from(document).sealed().to_json())
    assert command("verify", out).returncode == 0
    done = command("verify", out, "--against-inputs", "--json")
    assert done.returncode == 3
    (finding,) = json.loads(done.stdout)["findings"]
    found = (finding["file"], finding["tensor"], finding["start"], finding["stop"])
    assert found == (row.shard, "c", row.start + 1234, row.start + 1235)


def gone(role: Path) -> None:
    shutil.rmtree(role)


def without_weights(role: Path) -> None:
    (role / "model.safetensors").unlink()


def changed_in_the_middle(role: Path) -> None:
    path = role / "model.safetensors"
    flip(path, path.stat().st_size // 2 + 5000)  # in the fingerprint's sample, behind the middle of the data


def another_model(role: Path) -> None:
    shutil.rmtree(role)
    write_checkpoint(role, {"other": weights(np.random.default_rng(0), "BF16", (3, 3))})


@pytest.mark.parametrize("harm", [gone, without_weights, changed_in_the_middle, another_model])
@pytest.mark.parametrize("role", ["target", "donor", "reference"])
def test_an_input_gone_or_changed_is_named(models: Path, role: str, harm: Callable[[Path], None]) -> None:
    harm(models / role)
    done = command("verify", models / "swept-1", "--against-inputs", "--json")
    assert done.returncode == 2, done.stderr
    document = json.loads(done.stdout)
    assert document["problems"]
    for problem in document["problems"]:
        assert str(models / role) in problem["where"]
        assert problem["remedy"]
    assert command("verify", models / "swept-1").returncode == 0


def test_a_manifest_of_other_inputs_than_the_recipe_is_named(models: Path) -> None:
    path = models / "swept-1" / "rv_manifest.json"
    document = json.loads(path.read_bytes())
    document["inputs"].pop()
    path.write_bytes(manifest_from(document).sealed().to_json())
    done = command("verify", models / "swept-1", "--against-inputs", "--json")
    assert done.returncode == 3
    assert [finding["file"] for finding in json.loads(done.stdout)["findings"]] == ["rv_recipe.yaml"]


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_a_recipe_that_is_not_what_was_written_is_named(models: Path, harm: str) -> None:
    """A recipe that was changed must never decide what is compared."""
    path = models / "swept-1" / "rv_recipe.yaml"
    text = path.read_text()
    path.unlink()
    if harm == "changed":
        path.write_text(text.replace("alpha: 1.0", "alpha: 0.5"))
    with pytest.raises(rv.VerifyError, match=r"rv_recipe\.yaml"):
        rv.verify_against_inputs(str(models / "swept-1"))
