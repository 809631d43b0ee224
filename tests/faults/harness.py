"""What the tests of faults share: the compiled shim, quick ``rv`` processes, and what an output has to hold."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
MANIFEST, PIECES = "rv_manifest.json", "rv_pieces.parquet"
#: Calls by which a run changes what lies on the disk; each is a step at which it may die.
STEPS = "open|mkdir|rename|exchange|unlink|fsync|truncate|fallocate|write"


def why_no_shim() -> str | None:
    """Why faults cannot be injected here, if they cannot."""
    if sys.platform != "linux":
        return "faults are injected by LD_PRELOAD, as Linux has it"
    return None if shutil.which("cc") else "faults are injected by a library that needs a C compiler, cc"


def build_shim(folder: Path) -> Path:
    """Compile the shim."""
    library = folder / "shim.so"
    source = str(HERE / "shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"], check=True)
    return library


class Done(NamedTuple):
    """How a run ended."""

    status: int
    """Negative when it died of a signal."""
    stdout: str
    stderr: str
    hits: Counter[str]
    """How often each fault came true."""


class Fault(NamedTuple):
    """A fault for `Zygote.run`; the shim's source says what the fields mean."""

    calls: str
    where: str
    nth: int | str
    action: str


class Zygote:
    """Runs ``rv`` in a forked process each time. A context manager."""

    def __init__(self, shim: Path, folder: Path) -> None:
        self._folder = folder
        self._child = 0
        self.hits: Counter[str] = Counter()
        """Of all runs."""
        environment = {**os.environ, "LD_PRELOAD": str(shim)}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._answer() == {"ready": True}

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()
        self._process.kill()
        self._process.communicate()

    def run(self, *args: str | Path, faults: tuple[Fault, ...] = (), seed: int = 1, log: Path | None = None) -> Done:
        """``rv ARGS`` to its end."""
        self.begin(*args, faults=faults, seed=seed, log=log)
        return self.end()

    def begin(self, *args: str | Path, faults: tuple[Fault, ...] = (), seed: int = 1, log: Path | None = None) -> int:
        """Start ``rv ARGS``; its process id. `stopped` and `end` wait for it."""
        assert not self._child, "one run at a time"
        env = {
            "FAULT": ";".join(f"{f.calls},{f.where},{f.nth},{f.action}" for f in faults),
            "FAULT_SEED": str(seed),
            "FAULT_ROOT": str(self._folder),
            "FAULT_HITS": str(self._hits),
        }
        self._hits.write_text("")
        if log is not None:
            env["FAULT_LOG"] = str(log)
        outputs = {name: str(self._folder.parent / name) for name in ("stdout", "stderr")}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"argv": list(map(str, args)), "env": env, **outputs}) + "\n")
        self._process.stdin.flush()
        self._child = self._answer()["pid"]
        return self._child

    def stopped(self) -> None:
        """Return once the run has stopped (SIGSTOP)."""
        assert self._answer() == {"stopped": True}

    def end(self) -> Done:
        """How the run ended."""
        status = self._answer()["status"]
        self._child = 0
        stdout, stderr = ((self._folder.parent / name).read_text() for name in ("stdout", "stderr"))
        hits = Counter(_kind(*line.split()) for line in self._hits.read_text().splitlines())
        self.hits += hits
        return Done(status, stdout, stderr, hits)

    @property
    def _hits(self) -> Path:
        return self._folder.parent / "hits"

    def abandon(self) -> None:
        """Kill the run that a test left behind when it failed, if it did."""
        if self._child:
            with suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
            while "status" not in self._answer():
                pass
            self._child = 0

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote died"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _kind(action: str, call: str) -> str:
    match action:
        case "kill" | "stop" | "term" | "int":
            return f"SIG{action.upper()}"
        case "short":
            return f"short {call}"
    return f"{action} on {'read' if call == 'read' else 'write and others'}"


def content_of(out: Path) -> dict[str, bytes]:
    """Every file of an output but the table of pieces, which tells when and how fast it was made; of the manifest, all
    that does not tell it."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    manifest = json.loads(files[MANIFEST])
    del manifest["created"], manifest["timings"], manifest["digest"]
    manifest["files"] = [file for file in manifest["files"] if file["name"] != PIECES]
    del files[PIECES]
    files[MANIFEST] = json.dumps(manifest, sort_keys=True).encode()
    return files


def lost_bytes(found: Mapping[str, bytes], wanted: Mapping[str, bytes]) -> int:
    """How many bytes of ``wanted`` are missing or other in ``found``, and how many it has beside them."""
    lost = 0
    for name in found.keys() | wanted.keys():
        one, other = found.get(name, b""), wanted.get(name, b"")
        same = one == other and (name in found) == (name in wanted)
        lost += 0 if same else max(1, abs(len(one) - len(other)), sum(a != b for a, b in zip(one, other, strict=False)))
    return lost


def staged(out: Path) -> Path:
    return out.parent / f".{out.name}.rv"


def flip(path: Path, choose: random.Random) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        at = choose.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << choose.randrange(8))]))


def damage(path: Path, choose: random.Random) -> None:
    """What crashes, bad disks and people do to a file."""
    content = path.read_bytes()
    match choose.randrange(5):
        case 0 | 1:
            flip(path, choose)
        case 2:
            path.write_bytes(content[: choose.randrange(len(content))])
        case 3:  # a page that never reached the disk
            at = choose.randrange(len(content)) // 4096 * 4096
            path.write_bytes(content[:at] + bytes(min(4096, len(content) - at)) + content[at + 4096 :])
        case 4:
            path.write_bytes(content + content[: choose.randrange(len(content))])
