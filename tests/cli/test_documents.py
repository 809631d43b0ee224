"""What ``--json`` prints, against the JSON schemas of the package."""

from __future__ import annotations

import json
import logging
from io import StringIO
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from refusal import make_models, run_rv, transfer
from schemas import SCHEMAS, check

import rv_distributed as rv
from rv_distributed.checkpoint.manifest import MANIFEST_SCHEMA
from rv_distributed.cli.progress import log_as_json
from rv_distributed.cli.recipe import STARTER
from rv_distributed.logs import JsonLines

LOCAL = ("--runtime", "local")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_one(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def test_the_manifests_schema_is_that_of_the_code() -> None:
    assert SCHEMAS["manifest.schema.json"] == MANIFEST_SCHEMA


def test_documents_of_a_run(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = transfer(models, out, "--json", "--exclude", "embed")
    check("planned", run_rv(*args, "--dry-run").stdout)
    done = check("done", run_rv(*args).stdout)
    assert done["outputs"][0]["up_to_date"] is False
    assert check("done", run_rv(*args).stdout)["outputs"][0]["up_to_date"] is True
    check("manifest", (out / "rv_manifest.json").read_text())
    check("inspect", run_rv("inspect", out, "--json").stdout)
    check("inspect", run_rv("inspect", models / "target", "--json").stdout)
    check("verified", run_rv("verify", out, "--json").stdout)
    check("verified", run_rv("verify", out, "--against-inputs", "--json").stdout)
    check("written", run_rv("report", out, "--out", tmp_path / "r.html", "--json").stdout)
    assert run_rv("report", out, "--out", "-", "--json").status == 2
    check("compared", run_rv("diff", out, models / "target", "--json").stdout)


def test_documents_of_the_other_commands(models: Path, tmp_path: Path) -> None:
    check("version", run_rv("version", "--json").stdout)
    assert rv.__version__ in run_rv("version").stdout
    check("demo", run_rv("demo", "--out", tmp_path / "demo", "--json").stdout)
    check("written", run_rv("recipe", "init", tmp_path / "recipe.yaml", "--json").stdout)
    assert run_rv("recipe", "init", "--json").status == 2
    check("checked", run_rv("recipe", "check", tmp_path / "recipe.yaml", "--json").stdout)
    for args in (("recipe", "schema"), ("recipe", "schema", "--json")):
        assert json.loads(run_rv(*args).stdout) == SCHEMAS["recipe.schema.json"]
    (tmp_path / "plan.json").write_text(run_rv(*transfer(models, tmp_path / "out", "--json", "--dry-run")).stdout)
    bench = ("bench", tmp_path, "--size", "8MiB", "--plan", tmp_path / "plan.json", "--json")
    check("measured", run_rv(*bench).stdout)


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["verify", "OUT", "--json"], 3),
        (["inspect", "GONE", "--json"], 2),
        (["transfer", "--json"], 2),
        (["diff", "GONE", "OUT", "--json"], 2),
        (["no-such-command", "--json"], 2),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_are_documents(models: Path, tmp_path: Path, args: list[str], status: int) -> None:
    out = tmp_path / "out"
    if args[0] == "verify":
        assert run_rv(*transfer(models, out)).status == 0
        (out / "config.json").write_text("{}")
    done = run_rv(*(text.replace("OUT", str(out)).replace("GONE", str(tmp_path / "gone")) for text in args))
    assert done.status == status
    assert check("error", done.stdout)["error"]["exit_status"] == status


def test_recipes_are_what_their_schema_says() -> None:
    recipe = yaml.safe_load(STARTER)
    validator = jsonschema.Draft202012Validator(SCHEMAS["recipe.schema.json"])
    validator.validate(recipe)
    recipe["vectors"].append({"vector": "a", "alpha": [{"match": ["x", "y"], "alpha": [1, 2]}, {"alpha": 0}]})
    validator.validate(recipe)
    wrong: list[dict[str, Any]] = [{"vectorz": []}, {"vectors": []}, {"dtype": "int8"}]
    wrong.append({"vectors": [{"vector": "a", "alpha": "much"}]})
    for broken in wrong:
        assert not validator.is_valid({**recipe, **broken})


def test_lines_of_progress_and_events_are_what_their_schema_says() -> None:
    told = StringIO()
    handler = logging.StreamHandler(told)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("rv_distributed")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        log_as_json(rv.Progress(3, 8, 1, 100, 200, 1.5, {"host:1": rv.Share(2)}), 66.7)
        logger.info("worker %s is up", "host:1", extra={"fields": {"worker": "host:1", "node": "a"}})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    progress, event = told.getvalue().splitlines()
    assert check("event", progress)["bytes_per_s"] == 67
    # Events have fields of their own.
    jsonschema.validate(json.loads(event), SCHEMAS["event.schema.json"])
    with pytest.raises(jsonschema.ValidationError, match="bytes_total"):
        jsonschema.validate(json.loads(event) | {"event": "progress"}, SCHEMAS["event.schema.json"])
