"""A random job: small checkpoints, a command that makes outputs of them, and what those must hold by NumPy."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
from reference import USER_NAMES, Raw, combined, extracted, weights, write_checkpoint

FLOATS = tuple(USER_NAMES)
OTHERS = ("I64", "BOOL", "U8")
ALPHAS = ("0.5", "0.7", "1.0", "-0.3", "0.001", "0")


class Job(NamedTuple):
    """A command without its outputs, and its outputs' tensors."""

    command: list[str | Path]
    wanted: dict[str, dict[str, Raw]]
    """By the text of each alpha."""
    older: list[str | Path]
    """Options with which the command makes other outputs."""

    def to(self, folder: Path, *more: str | Path) -> list[str | Path]:
        return [*self.command, "--out", folder / ("out-{alpha}" if len(self.wanted) > 1 else "out"), *more]

    def outs(self, folder: Path) -> list[Path]:
        if len(self.wanted) == 1:
            return [folder / "out"]
        return [folder / f"out-{alpha}" for alpha in self.wanted]


def random_job(choose: random.Random, folder: Path) -> Job:
    """Write checkpoints below ``folder``, and a command for them."""
    operation = choose.choice(("extract", "apply", "transfer", "transfer"))
    shapes = _shapes(choose)
    models = {role: _tensors(choose, shapes) for role in ("target", "donor", "reference")}
    rng = np.random.default_rng(choose.getrandbits(64))
    if operation != "extract":
        models["target"] |= {
            f"other{n}": weights(rng, choose.choice(OTHERS), (7,)) for n in range(choose.randint(0, 2))
        }
    for role, tensors in models.items():
        names = choose.sample(["tokenizer.json", "LICENSE", "original/notes.txt", "chat_template.jinja"], 2)
        sidecars = {"config.json": b"{}"} | {name: rng.bytes(choose.randint(0, 5000)) for name in names}
        shards = choose.randint(1, min(3, len(tensors)))
        write_checkpoint(folder / role, tensors, shards=shards, pad=choose.randint(0, 9), sidecars=sidecars)
    used = ["donor", "reference"] if operation == "extract" else list(models)
    flags = {role: f"--{role}" for role in used} if operation != "apply" else _vectors(used)
    command: list[str | Path] = [operation]
    for role in used:
        command += [flags[role], folder / role]
    command += ["--runtime", "local", "--workers", str(choose.choice((1, 1, 2, 4)))]
    command += ["--max-shard-size", f"{choose.randint(400_000, 4_000_000)}B"]
    dtype = choose.choice([None, None, *FLOATS])
    if dtype is not None:
        command += ["--dtype", USER_NAMES[dtype]]
    if operation == "extract":
        wanted = {"": {n: extracted(a, models["reference"][n], dtype or "F32") for n, a in models["donor"].items()}}
    else:
        alphas = choose.sample(ALPHAS, choose.choice((1, 1, 2, 3)))
        command.append(f"--alpha={','.join(alphas)}")
        wanted = {alpha: _output(operation, models, float(alpha), dtype) for alpha in alphas}
    return Job(command, wanted, ["--exclude", "^first$"])


def _vectors(used: list[str]) -> dict[str, str]:
    return {role: "--target" if role == "target" else "--vector" for role in used}


def _shapes(choose: random.Random) -> dict[str, tuple[int, ...]]:
    """Two to seven tensors of a few MiB in all, the first two never empty."""
    shapes: dict[str, tuple[int, ...]] = {
        "first": (choose.randint(1, 1_200_000),),
        "second": (choose.randint(1, 1500), 701),
    }
    for number in range(choose.randint(0, 5)):
        kinds = [(), (0, 3), (choose.randint(1, 5000),), (choose.randint(1, 300), choose.randint(1, 1200))]
        shapes[f"layer.{number}.weight"] = choose.choice(kinds)
    return shapes


def _tensors(choose: random.Random, shapes: dict[str, tuple[int, ...]]) -> dict[str, Raw]:
    rng = np.random.default_rng(choose.getrandbits(64))
    return {name: weights(rng, choose.choice(FLOATS), shape) for name, shape in shapes.items()}


def _output(operation: str, models: dict[str, dict[str, Raw]], alpha: float, dtype: str | None) -> dict[str, Raw]:
    def output(name: str, raw: Raw) -> Raw:
        if raw.dtype not in USER_NAMES:
            return raw
        donor, reference = models["donor"][name], models["reference"][name]
        pairs = [(donor, reference)] if operation == "transfer" else [(donor, None), (reference, None)]
        return combined(raw, pairs, [alpha] * len(pairs), dtype)

    return {name: output(name, raw) for name, raw in models["target"].items()}
