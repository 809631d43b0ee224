"""The files of cluster/kuberay: valid for KubeRay and Kubernetes, and right in what they say to Ray and to rv."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from rv_distributed.demo import make_checkpoints
from rv_distributed.runtime.on_ray.runtime import _OBJECT_STORE_BYTES, ACTOR_BYTES, GPU_ACTOR_BYTES
from rv_distributed.runtime.sizing import DEFAULT_BUDGET_BYTES
from rv_distributed.units import parse_bytes

FOLDER = Path(__file__).parents[2] / "cluster" / "kuberay"
#: The oldest Kubernetes that its makers still support when this is written.
KUBERNETES = "1.33"
#: What Ray's own processes take on a node: raylet, agents, its log monitor.
RAY_BYTES = 600 << 20
SCHEMA = json.loads((Path(__file__).parent / "kuberay.schema.json").read_text())
DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
JOBS = [document for document in DOCUMENTS if document["apiVersion"] == "ray.io/v1"]
OTHERS = [document for document in DOCUMENTS if document not in JOBS]


def name_of(document: dict[str, Any]) -> str:
    return str(document["metadata"]["name"])


every_job = pytest.mark.parametrize("document", JOBS, ids=name_of)


def job_of(document: dict[str, Any]) -> dict[str, Any]:
    """The spec of the RayJob that a document is, or makes."""
    spec: dict[str, Any] = document["spec"]
    return spec["jobTemplate"] if document["kind"] == "RayCronJob" else spec


def worker_groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = job_of(document)["rayClusterSpec"]["workerGroupSpecs"]
    return groups


def ray_pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod specs of the head and of the workers."""
    head = job_of(document)["rayClusterSpec"]["headGroupSpec"]
    return [group["template"]["spec"] for group in (head, *worker_groups(document))]


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [*ray_pods(document), job_of(document)["submitterPodTemplate"]["spec"]]


def limits(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    found: dict[str, Any] = container["resources"]["limits"]
    return found


def quantity(text: str) -> int:
    """Bytes, of a Kubernetes quantity with a binary suffix."""
    number, suffix = re.fullmatch(r"(\d+)([KMGT]i)", text).groups()  # type: ignore[union-attr]
    return int(number) << {"K": 10, "M": 20, "G": 30, "T": 40}[suffix[0]]


def command(document: dict[str, Any]) -> list[str]:
    return shlex.split(job_of(document)["entrypoint"])


def option(argv: list[str], name: str) -> str | None:
    return argv[argv.index(name) + 1] if name in argv else None


def schema_faults(document: dict[str, Any]) -> list[str]:
    schema = {**SCHEMA, "$ref": f"#/$defs/{document['kind']}"}
    faults = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return [f"{'/'.join(map(str, fault.absolute_path))}: {fault.message}" for fault in faults]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(str(folder))
    return folder


def test_there_is_a_file_for_every_case() -> None:
    assert [path.name for path in sorted(FOLDER.iterdir())] == [
        "raycronjob.yaml",
        "rayjob-cpu.yaml",
        "rayjob-gpu.yaml",
        "storage.yaml",
    ]
    assert [document["kind"] for document in JOBS] == ["RayCronJob", "RayJob", "RayJob"]


@every_job
def test_a_job_fits_the_strict_schema(document: dict[str, Any]) -> None:
    assert schema_faults(document) == []


@every_job
def test_every_pod_of_a_job_is_a_pod(document: dict[str, Any]) -> None:
    for spec in pods(document):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("document", OTHERS, ids=name_of)
def test_other_kinds_are_valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_the_checks_see_misspelt_fields_and_wrong_values() -> None:
    good = JOBS[1]
    bad = copy.deepcopy(good)
    bad["spec"]["backofLimit"] = 2
    bad["spec"]["submissionMode"] = "K8SJobMode"
    bad["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    bad["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "none"
    assert [fault.partition(":")[0] for fault in schema_faults(bad)] == [
        "spec",
        "spec/rayClusterSpec/authOptions/mode",
        "spec/rayClusterSpec/workerGroupSpecs/0/maxReplicas",
        "spec/submissionMode",
    ]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": copy.deepcopy(ray_pods(good)[0])}
    pod["spec"]["terminationGraceSeconds"] = 60  # type: ignore[index]
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@every_job
def test_the_command_line_is_one_that_rv_takes(document: dict[str, Any], models: Path, tmp_path: Path) -> None:
    argv = command(document)
    assert argv[:2] == ["rv", "transfer"]
    for role in ("target", "donor", "reference"):
        assert Path(option(argv, f"--{role}") or "").parent == Path("/models")
        argv[argv.index(f"--{role}") + 1] = str(models / role)
    assert Path(option(argv, "--out") or "").parent == Path("/outputs")
    argv[argv.index("--out") + 1] = str(tmp_path / "out")
    rv = [sys.executable, "-c", "from rv_distributed.cli import main; main()"]
    done = subprocess.run(
        [*rv, *argv[1:], "--dry-run", "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["status"] == "planned"
    assert list(tmp_path.iterdir()) == []


@every_job
def test_the_driver_is_on_the_head_and_no_worker_is(document: dict[str, Any]) -> None:
    job = job_of(document)
    argv = command(document)
    assert (option(argv, "--runtime"), option(argv, "--address")) == ("ray", "auto")
    assert not [key for key in job if key.startswith("entrypoint") and key != "entrypoint"]
    head = job["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in limits(head["template"]["spec"])
    # The shell of the submitter gets it as it is: one line.
    assert "\n" not in job["entrypoint"].strip()


@every_job
def test_the_memory_of_a_node_holds_its_workers_and_ray(document: dict[str, Any]) -> None:
    argv = command(document)
    budget = parse_bytes(option(argv, "--memory-budget") or "", "--memory-budget")
    assert budget == DEFAULT_BUDGET_BYTES
    for group in worker_groups(document):
        found = limits(group["template"]["spec"])
        per_worker = budget + (GPU_ACTOR_BYTES if "nvidia.com/gpu" in found else ACTOR_BYTES)
        # Without --cpus-per-worker, and with a GPU in any case, a worker takes one CPU.
        workers = int(found.get("nvidia.com/gpu", found["cpu"]))
        store = int(group["rayStartParams"]["object-store-memory"])
        assert int(found["cpu"]) >= workers
        assert quantity(found["memory"]) >= workers * per_worker + store + RAY_BYTES
        if "nvidia.com/gpu" not in found:
            assert quantity(found["memory"]) <= 1.5 * (workers * per_worker + store + RAY_BYTES)


@every_job
def test_the_object_stores_are_small(document: dict[str, Any]) -> None:
    cluster = job_of(document)["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert int(group["rayStartParams"]["object-store-memory"]) == _OBJECT_STORE_BYTES


@every_job
def test_an_autoscaler_is_told_what_the_job_could_use(document: dict[str, Any]) -> None:
    cluster = job_of(document)["rayClusterSpec"]
    workers = option(command(document), "--workers")
    groups = worker_groups(document)
    grown = sum(group["maxReplicas"] * int(limits(group["template"]["spec"])["cpu"]) for group in groups)
    if cluster.get("enableInTreeAutoscaling"):
        assert int(workers or 0) == grown
        assert all(group["minReplicas"] < group["maxReplicas"] for group in groups)
    else:
        assert workers is None
        assert all(group["minReplicas"] == group["maxReplicas"] for group in groups)
    for group in groups:
        # A job starts when its first nodes are up; one that wants GPUs has to find some then.
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@every_job
def test_gpus_are_asked_for_where_the_command_wants_them(document: dict[str, Any]) -> None:
    wants = option(command(document), "--device") == "cuda"
    assert wants == ("gpu" in document["metadata"]["name"])
    for group in worker_groups(document):
        spec = group["template"]["spec"]
        assert ("nvidia.com/gpu" in limits(spec)) == wants
        assert any(t["key"] == "nvidia.com/gpu" for t in spec.get("tolerations", [])) == wants


@every_job
def test_a_failed_run_is_retried_and_can_resume(document: dict[str, Any]) -> None:
    job = job_of(document)
    assert job["submissionMode"] == "K8sJobMode"
    assert 1 <= job["backoffLimit"] <= 5
    assert "--restart" not in command(document)
    assert job["shutdownAfterJobFinishes"] is True
    assert job["ttlSecondsAfterFinished"] > 0
    assert job["activeDeadlineSeconds"] > 0
    # `ray start` drains for 30 s when its pod is ended.
    assert all(pod["terminationGracePeriodSeconds"] > 30 for pod in ray_pods(document))
    # A Job's pod may not restart for ever; a node that died is another node when it comes back.
    assert {pod["restartPolicy"] for pod in pods(document)} == {"Never"}


def test_the_runs_of_the_cron_job_do_not_overlap() -> None:
    (cron,) = [document for document in JOBS if document["kind"] == "RayCronJob"]
    assert re.fullmatch(r"\d+ \d+ \* \* \*", cron["spec"]["schedule"])  # once a day
    assert job_of(cron)["activeDeadlineSeconds"] < 24 * 3600
    assert "--overwrite" in command(cron)


@every_job
def test_ray_wants_a_token_on_every_node(document: dict[str, Any]) -> None:
    assert job_of(document)["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for pod in pods(document):
        (container,) = pod["containers"]
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


@every_job
def test_pods_have_no_rights_that_they_do_not_need(document: dict[str, Any]) -> None:
    autoscaler = job_of(document)["rayClusterSpec"].get("autoscalerOptions")
    for pod in pods(document):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        # Only the autoscaler, beside the head, talks to Kubernetes.
        is_its_head = autoscaler is not None and container["name"] == "ray-head"
        assert pod.get("automountServiceAccountToken", True) is is_its_head
        if autoscaler is not None:
            assert autoscaler["securityContext"] == container["securityContext"]


@every_job
def test_pods_mount_the_claims_and_only_write_outputs(document: dict[str, Any]) -> None:
    claims = {name_of(other): other for other in OTHERS}
    for pod in pods(document):
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in mounts.values()} == volumes.keys()
        assert "emptyDir" in volumes[mounts["/tmp"]["name"]]  # noqa: S108
    for pod in ray_pods(document):
        mounts = {mount["mountPath"]: mount for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts["/models"].get("readOnly", False) is True
        assert mounts["/outputs"].get("readOnly", False) is False
        # Nobody wants the ownership of some terabytes changed at every start.
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        for volume in pod["volumes"]:
            if "persistentVolumeClaim" in volume:
                claim = claims[volume["persistentVolumeClaim"]["claimName"]]
                assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@every_job
def test_requests_are_limits_and_ports_have_kuberays_names(document: dict[str, Any]) -> None:
    for pod in ray_pods(document):
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]


@every_job
def test_a_job_has_one_image_and_a_name_that_is_short_enough(document: dict[str, Any]) -> None:
    assert len({container["image"] for pod in pods(document) for container in pod["containers"]}) == 1
    name = name_of(document)
    # KubeRay's limit is 47; a RayCronJob adds six characters.
    assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name)
    assert len(name) <= 41


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_the_commands_in_the_comments_name_what_is_there(path: Path) -> None:
    text = path.read_text()
    names = {document["metadata"]["name"] for document in yaml.safe_load_all(text)}
    commands = re.findall(r"^#   (kubectl .*)", text, re.MULTILINE)
    assert commands[0].startswith("kubectl apply")
    for line in commands:
        argv = shlex.split(line, comments=True)
        files = [argv[n + 1] for n, word in enumerate(argv) if word == "-f"]
        assert all((FOLDER / file).is_file() for file in files)
        assert path.name in files if "apply" in argv else names & set(re.split(r"[ =]", " ".join(argv)))
