"""The images' Dockerfiles: linted, pinned, not root, and of one mind with the package and with cluster/kuberay."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from rv_distributed import __version__

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "docker"
KINDS = ["cpu", "cuda"]
#: The jobs that use each image.
USED_BY = {"cpu": ["rayjob-cpu", "raycronjob"], "cuda": ["rayjob-gpu"]}

Instruction = tuple[str, str]


def dockerfile(kind: str) -> Path:
    return FOLDER / f"Dockerfile.{kind}"


def instructions(kind: str) -> list[Instruction]:
    """Each instruction and its text, with lines that go on joined, and ARGs put in."""
    text = re.sub(r"^#.*\n", "", dockerfile(kind).read_text(), flags=re.MULTILINE)
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    found: list[Instruction] = []
    values: dict[str, str] = {}
    for line in lines:
        word, _, rest = line.partition(" ")
        rest = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], rest.strip())
        if word == "ARG":
            name, _, value = rest.partition("=")
            values[name] = value
        found.append((word, rest))
    return found


def of(kind: str, word: str) -> list[str]:
    return [rest for found, rest in instructions(kind) if found == word]


@pytest.mark.parametrize("kind", KINDS)
def test_hadolint_finds_nothing(kind: str) -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert linter is not None, "pip install --group dev brings hadolint"
    done = subprocess.run(
        [linter, "--no-color", dockerfile(kind)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", KINDS)
def test_bases_and_packages_are_pinned(kind: str) -> None:
    bases = of(kind, "FROM")
    assert len(bases) == 2
    assert {base.partition(" AS ")[0] for base in bases} == {"python:3.11-slim-bookworm"}
    installs = [part for run in of(kind, "RUN") for part in re.split(r"&&|^--mount=\S+", run) if "pip install" in part]
    assert len(installs) == 3
    for install in installs:
        assert "--no-cache-dir" in install
        wanted = [word.strip('"') for word in install.split("pip install")[1].split() if not word.startswith("-")]
        wanted = [word for word in wanted if "//" not in word]
        assert wanted
        assert all("==" in word or word.startswith("/wheels/") for word in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_runs_as_the_user_that_the_pods_name(kind: str) -> None:
    words = [word for word, _ in instructions(kind)]
    assert of(kind, "USER") == ["1000:1000"]
    assert words.index("USER") > max(n for n, word in enumerate(words) if word == "RUN")
    for name in USED_BY[kind]:
        text = (ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text()
        assert set(re.findall(r"runAs(?:User|Group): (\d+)", text)) == {"1000"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_holds_no_downloads_leftovers_or_secrets(kind: str) -> None:
    assert of(kind, "ADD") == []
    assert all("rm -rf /var/lib/apt/lists/*" in run for run in of(kind, "RUN") if "apt-get" in run)
    assert not re.search(r"(?i)token|secret|passw|credential|_key", dockerfile(kind).read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_tag_is_the_jobs_image_and_the_packages_version(kind: str) -> None:
    (tag,) = re.findall(r"--tag (\S+)", dockerfile(kind).read_text())
    assert tag.endswith(f":{__version__}-{kind}")
    for name in USED_BY[kind]:
        text = (ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text()
        assert re.findall(r"image: &image (\S+)", text) == [tag]
        assert set(re.findall(r"(?m)^ *(?:- )?image: (?!&)(\S+)", text)) == {"*image"}
    (file,) = re.findall(r"--file (\S+)", dockerfile(kind).read_text())
    assert ROOT / file == dockerfile(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_ray_and_torch_are_those_of_the_jobs_and_of_the_tests(kind: str) -> None:
    args = dict(arg.split("=", 1) for arg in of(kind, "ARG"))
    assert f"torch=={args['TORCH_VERSION']}" in (ROOT / "Makefile").read_text()
    for name in USED_BY[kind]:
        document = yaml.safe_load((ROOT / "cluster" / "kuberay" / f"{name}.yaml").read_text())
        spec = document["spec"].get("jobTemplate", document["spec"])
        assert spec["rayClusterSpec"]["rayVersion"] == args["RAY_VERSION"]
    # Jobs, the dashboard and metrics are in the extra.
    assert re.findall(r'"(ray\S*)"', " ".join(of(kind, "RUN"))) == [f"ray[default]=={args['RAY_VERSION']}"] * 2


def test_the_images_differ_in_torch_alone() -> None:
    def common(kind: str) -> list[Instruction]:
        own = ("LABEL", "ENV")
        found = [(word, rest) for word, rest in instructions(kind) if word not in own and "TORCH_INDEX" not in rest]
        return [(word, re.sub(r"--index-url \S+", "", rest)) for word, rest in found]

    assert common("cpu") == common("cuda")
    assert '--index-url https://download.pytorch.org/whl/cpu "torch==' in " ".join(of("cpu", "RUN"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_wheel_is_built_from_what_is_copied(kind: str, tmp_path: Path) -> None:
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    source = tmp_path / "src"
    source.mkdir()
    for copied in of(kind, "COPY"):
        *names, _target = copied.split()
        for name in names:
            assert name in admitted, f".dockerignore keeps {name} from the builder"
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source)
    (build,) = [run for run in of(kind, "RUN") if "pip wheel" in run]
    argv = build.replace("/wheels", str(tmp_path / "wheels")).split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *argv, "--no-build-isolation", "--no-index"],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name == f"rv_distributed-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        entry = files.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    packaged = {str(path.relative_to(ROOT)) for path in (ROOT / "rv_distributed").rglob("*.py")}
    assert packaged <= set(names)
    assert "rv = rv_distributed.cli:main" in entry
