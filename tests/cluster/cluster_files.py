"""Where the files of ``cluster/`` are, and what they hold."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"


def documents(path: Path) -> list[dict[str, Any]]:
    """The YAML documents in a file."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def expressions() -> dict[str, str]:
    """All PromQL expressions, by the panel or alert that they belong to."""
    dashboard = json.loads((CLUSTER / "prometheus" / "dashboard.json").read_text())
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in dashboard["panels"] for t in p["targets"]}
    for group in documents(CLUSTER / "prometheus" / "rules.yaml")[0]["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return found


def rv_commands() -> dict[str, list[str]]:
    """The rv command lines in ``cluster/slurm`` and in its README; `test_kuberay` has its own."""
    found = {}
    script = (CLUSTER / "slurm" / "rv.sbatch").read_text()
    array = re.search(r"^command=\((.*?)\)$", script, re.MULTILINE | re.DOTALL)
    assert array
    found["rv.sbatch"] = [*shlex.split(array[1]), "--address", "$address"]
    readme = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    for number, line in enumerate(re.findall(r"^\$ .*?\b(rv (?:extract|apply|transfer|verify)[^\"\n]*)", readme, re.M)):
        found[f"README.md {number}"] = shlex.split(line)
    for number, line in enumerate(re.findall(r"^\$ rv submit .*? -- (.*)$", readme, re.MULTILINE)):
        found[f"README.md submit {number}"] = ["rv", *shlex.split(line)]
    return found
