"""The Kubernetes files, against KubeRay's and Kubernetes' own schemas, and against each other.

``kuberay-rayjob.schema.json`` is derived from KubeRay's CRD (ray.io/v1, August 2026, Apache-2.0), made strict: unknown
fields are errors. A RayCronJob's ``jobTemplate`` has the schema of a RayJob's ``spec``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from cluster_files import CLUSTER, documents, job_specs, pod_templates

RAYJOB = json.loads((Path(__file__).parent / "kuberay-rayjob.schema.json").read_text())
SPECS = job_specs()


def test_every_kind_of_job_is_there() -> None:
    assert set(SPECS) == {"raycronjob.yaml", "rayjob-cpu.yaml", "rayjob-gpu.yaml"}


@pytest.mark.parametrize("name", SPECS)
def test_job_has_the_fields_of_the_crd(name: str) -> None:
    (document,) = documents(CLUSTER / "kuberay" / name)
    assert document["apiVersion"] == "ray.io/v1"
    if document["kind"] == "RayCronJob":
        assert set(document["spec"]) == {"schedule", "timeZone", "jobTemplate"}
        assert len(document["spec"]["schedule"].split()) == 5
    else:
        assert document["kind"] == "RayJob"
    jsonschema.validate(SPECS[name], RAYJOB["properties"]["spec"])


def test_a_misspelt_field_is_an_error() -> None:
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(SPECS["rayjob-cpu.yaml"] | {"backofLimit": 1}, RAYJOB["properties"]["spec"])


@pytest.mark.parametrize("name", SPECS)
def test_job_ends_and_leaves_nothing(name: str) -> None:
    spec = SPECS[name]
    # The schema does not know the values of this one.
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert spec["backoffLimit"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in (spec["rayClusterSpec"]["headGroupSpec"], *spec["rayClusterSpec"]["workerGroupSpecs"]):
        # Ray takes strings only, and 75 MiB at least.
        assert 100_000_000 <= int(group["rayStartParams"]["object-store-memory"]) <= 200_000_000
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", SPECS)
def test_pods_are_valid_and_have_no_privileges(name: str) -> None:
    for template in pod_templates(SPECS[name]):
        pod: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "p"}}
        kubernetes_validate.validate(pod, "1.34", strict=True)
        assert template["metadata"]["labels"] == {"app.kubernetes.io/name": "rv"}
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert {"name": "RAY_AUTH_MODE", "value": "disabled"} in container["env"]
            assert set(container["resources"]) == {"requests", "limits"}


def test_only_gpu_workers_ask_for_gpus() -> None:
    for name, spec in SPECS.items():
        (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == ("gpu" in name)
        assert ("--device cuda" in spec["entrypoint"]) == ("gpu" in name)


@pytest.mark.parametrize("name", ["volume.yaml", "network-policy.yaml"])
def test_other_kinds_are_valid(name: str) -> None:
    for document in documents(CLUSTER / "kuberay" / name):
        kubernetes_validate.validate(document, "1.34", strict=True)


def test_files_agree_on_names_and_ports() -> None:
    (volume,) = documents(CLUSTER / "kuberay" / "volume.yaml")
    (policy,) = documents(CLUSTER / "kuberay" / "network-policy.yaml")
    (monitor,) = documents(CLUSTER / "prometheus" / "podmonitor.yaml")
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
    admitted = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    for spec in SPECS.values():
        for template in list(pod_templates(spec))[1:]:
            (claim,) = template["spec"]["volumes"]
            assert claim["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]
            (container,) = template["spec"]["containers"]
            (port,) = container["ports"]
            assert port["name"] == monitor["spec"]["podMetricsEndpoints"][0]["port"]
            assert port["containerPort"] in admitted
