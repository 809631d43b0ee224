"""What is submitted: the command, its environment, and the name of the work."""

from __future__ import annotations

import json
import shlex
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import blake3

from rv_distributed.errors import UsageError

#: What a driver takes: Ray's client, the plan and the results. 130 MB measured, for a small plan.
_DRIVER_BYTES: Final = 512 << 20
#: How long a stopped job may take to end before Ray kills it; Ray's own 3 s are short for a slow storage.
STOP_WAIT_S: Final = 30


@dataclass(frozen=True, slots=True)
class JobRequest:
    """An rv command line for a cluster, and what it needs there."""

    arguments: tuple[str, ...]
    """Of rv; the command's name is the first."""
    parsed: Mapping[str, object]
    """The same as the command's parameters: however it was written, the same work has the same name."""
    cpus: float = 0.0
    """Reserved for the driver."""
    memory_bytes: int = _DRIVER_BYTES
    """Reserved for the driver. With neither CPUs nor memory, Ray ties it to the head node."""
    working_dir: str | None = None
    """Folder to send along; the job's current directory."""
    wheel: str | None = None
    """Wheel of rv_distributed to send along; its dependencies must be installed on the nodes."""
    image: str | None = None
    """Container image of the driver and the workers."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the command reads its options from."""

    @property
    def submission_id(self) -> str:
        """Names the work, wherever it is submitted to."""
        work = [self.arguments[0], self.parsed, self.working_dir, self.wheel, self.image]
        text = json.dumps(work, sort_keys=True, default=str)
        return f"rv-{self.arguments[0]}-{blake3.blake3(text.encode()).hexdigest(length=8)}"

    @property
    def entrypoint(self) -> str:
        return shlex.join(("python", "-m", "rv_distributed", *self.arguments))

    @contextmanager
    def runtime_env(self) -> Iterator[dict[str, Any]]:
        """Ray's description of the environment; its local files exist inside the context. Raises UsageError."""
        env: dict[str, Any] = {"env_vars": {**self.environment, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        if self.working_dir is not None:
            env["working_dir"] = self.working_dir
        if self.image is not None:
            env["image_uri"] = self.image
        with tempfile.TemporaryDirectory() as folder:
            if self.wheel is not None:
                env["py_modules"] = [_unpacked(self.wheel, folder)]
                # Python and Ray both look into the current directory first, which may hold another rv_distributed.
                env.setdefault("working_dir", folder)
            yield env


def _unpacked(wheel: str, folder: str) -> str:
    """The package in a wheel. As a package, and not as a wheel, Ray takes it without pip and a network."""
    package = Path(folder, "rv_distributed")
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"--wheel: {wheel} cannot be read ({error})") from None
    if not (package / "__main__.py").is_file():
        raise UsageError(f"--wheel: {wheel} is no wheel of rv_distributed; make one with: make build")
    return str(package)
