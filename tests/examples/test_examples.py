"""The examples: each by its own parser or schema, their rv commands by rv, and the script by running it."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hera.workflows.models import Workflow
from refusal import make_models, run_rv
from schemas import strict

import rv_distributed as rv

EXAMPLES = Path(__file__).parents[2] / "examples"
Words = list[str | Path]
GITHUB_CHECK: Words = [Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", "vendor.github-workflows"]
GITHUB = EXAMPLES / "github" / "reasoning-transfer.yml"
ARGO = EXAMPLES / "argo" / "workflow.yaml"
AIRFLOW = EXAMPLES / "airflow" / "reasoning_transfer.py"
#: Prints what Airflow makes of a folder.
DAG_BAG = """
import json, sys
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(dag_folder=sys.argv[1])
tasks = {name: {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks} for name, dag in bag.dags.items()}
print(json.dumps([bag.import_errors, tasks]))
"""


def test_github_knows_the_workflow() -> None:
    done = subprocess.run([*GITHUB_CHECK, GITHUB], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_github_refuses_a_misspelt_field(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(GITHUB.read_text().replace("timeout-minutes", "timeout-minute"))
    assert subprocess.run([*GITHUB_CHECK, tmp_path / "x.yml"], capture_output=True, check=False).returncode == 1


def test_argo_knows_the_workflow() -> None:
    document, schema = yaml.safe_load(ARGO.read_text()), strict(Workflow.model_json_schema())
    jsonschema.validate(document, schema)
    document["spec"]["templates"][1]["container"]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(document, schema)


def test_argos_templates_and_parameters_are_there() -> None:
    spec = yaml.safe_load(ARGO.read_text())["spec"]
    templates = {template["name"]: template for template in spec["templates"]}
    tasks = templates[spec["entrypoint"]]["dag"]["tasks"]
    assert {task["template"] for task in tasks} <= templates.keys()
    names = {task["name"] for task in tasks}
    assert {word.split(".")[0] for task in tasks if "depends" in task for word in task["depends"].split()} <= names
    given = {parameter["name"] for parameter in spec["arguments"]["parameters"]}
    assert set(re.findall(r"\{\{workflow\.parameters\.(\w+)\}\}", ARGO.read_text())) == given
    for task in tasks:
        assert {entry["name"] for entry in task["arguments"]["parameters"]} == {"command"}


def test_airflows_file_uses_what_its_sdk_exports() -> None:
    """What can be told without Airflow, which is a hundred packages: the slow test asks Airflow itself."""
    tree = ast.parse(AIRFLOW.read_text())
    imported = {
        (node.module, name.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("airflow")
        for name in node.names
    }
    assert imported == {
        ("airflow.sdk", "dag"),
        ("airflow.sdk", "task"),
        ("airflow.sdk.exceptions", "AirflowFailException"),
    }


@pytest.mark.slow
@pytest.mark.skipif("RV_AIRFLOW" not in os.environ, reason="RV_AIRFLOW names no environment with apache-airflow")
def test_airflow_knows_the_dag(tmp_path: Path) -> None:
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    python = Path(os.environ["RV_AIRFLOW"]) / "bin" / "python"
    command: Words = [python, "-c", DAG_BAG, AIRFLOW.parent]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=True)
    errors, dags = json.loads(done.stdout.splitlines()[-1])
    assert errors == {}
    assert dags == {"reasoning_transfer": {"plan": ["transfer"], "transfer": ["verify"], "verify": []}}


def airflow_command() -> list[str]:
    """The list that the DAG's file builds."""
    names: dict[str, Any] = {}
    for node in ast.parse(AIRFLOW.read_text()).body:
        if isinstance(node, ast.Assign):
            exec(compile(ast.Module([node], []), "x", "exec"), names)  # noqa: S102 - our own file
    command: list[str] = names["COMMAND"]
    return [*command, "--alpha", "0.5,0.7"]


def commands() -> dict[str, list[str]]:
    """All rv commands in the examples, with parameters put in."""
    found = {"airflow": airflow_command()}
    argo = yaml.safe_load(ARGO.read_text())["spec"]
    values = {entry["name"]: str(entry["value"]) for entry in argo["arguments"]["parameters"]}
    for number, text in enumerate(re.findall(r"exec (rv [^\n]*(?:\n {20}[^\n]*)*)", ARGO.read_text())):
        filled = re.sub(r"\{\{workflow\.parameters\.(\w+)\}\}", lambda match: values[match[1]], text)
        found[f"argo {number}"] = shlex.split(filled)
    for number, text in enumerate(re.findall(r"run: (rv [^\n>]*)", GITHUB.read_text())):
        found[f"github {number}"] = shlex.split(text)
    return found


COMMANDS = commands()


@pytest.mark.parametrize("name", COMMANDS)
def test_rv_knows_the_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rv gets as far as the inputs, which are not there: it parsed every option and every value."""
    monkeypatch.chdir(tmp_path)
    program, *arguments = COMMANDS[name]
    assert program == "rv"
    arguments = [argument.replace("/shared", str(tmp_path)) for argument in arguments]
    done = run_rv(*arguments)
    if arguments[0] == "version":
        assert done.status == 0
    else:
        assert (done.status, "No such option" in done.stderr, "Usage" in done.stderr) == (2, False, False), done


def test_many_targets_are_made_on_one_ray(tmp_path: Path) -> None:
    models = make_models(tmp_path / "models")
    (models / "target").rename(models / "one")
    make_models(tmp_path / "more")
    (tmp_path / "more" / "target").rename(models / "two")
    inputs: Words = ["--donor", models / "donor", "--reference", models / "reference", "--alpha", "0.7"]
    script: Words = [
        sys.executable,
        EXAMPLES / "many_targets.py",
        *inputs,
        "--out",
        f"{tmp_path}/out-{{name}}",
        "--workers",
        "1",
    ]
    targets: Words = [models / "one", models / "two", models / "gone"]
    done = subprocess.run([*script, *targets], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    assert "gone" in done.stderr
    for name in ("one", "two"):
        assert f"{name}: " in done.stdout
        rv.verify(str(tmp_path / f"out-{name}"))
        rv.verify_against_inputs(str(tmp_path / f"out-{name}"))
