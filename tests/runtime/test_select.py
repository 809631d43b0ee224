"""Which runtime a run gets: by its options, by the environment of a Ray job, by the GPUs of the machine."""

from __future__ import annotations

from typing import Any

import pytest

from rv_distributed.errors import UsageError
from rv_distributed.runtime import select
from rv_distributed.runtime.model import WorkerShape
from rv_distributed.runtime.select import RunOptions, choose_runtime, expected_shape, usable_cpus, visible_gpus


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hint of Ray in the environment, and no GPU."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(select, "visible_gpus", lambda: 0)


def test_auto_is_local_without_a_hint() -> None:
    assert choose_runtime(RunOptions()) == "local"


def test_an_address_asks_for_ray() -> None:
    assert choose_runtime(RunOptions(address="ray://head:10001")) == "ray"


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_JOB_ID"])
def test_the_environment_of_ray_asks_for_ray(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "somewhere")
    assert choose_runtime(RunOptions()) == "ray"
    assert choose_runtime(RunOptions(runtime="local")) == "local"
    monkeypatch.setenv(name, "")
    assert choose_runtime(RunOptions()) == "local"


@pytest.mark.parametrize(
    ("gpus", "device", "runtime"),
    [(1, "auto", "local"), (2, "auto", "ray"), (8, "cuda", "ray"), (8, "cpu", "local")],
)
def test_several_gpus_ask_for_ray_unless_the_device_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: Any, runtime: str
) -> None:
    monkeypatch.setattr(select, "visible_gpus", lambda: gpus)
    assert choose_runtime(RunOptions(device=device)) == runtime


def test_what_is_asked_for_wins_over_every_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(select, "visible_gpus", lambda: 8)
    assert choose_runtime(RunOptions(runtime="local")) == "local"
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(select, "visible_gpus", lambda: 0)
    assert choose_runtime(RunOptions(runtime="ray")) == "ray"


@pytest.mark.parametrize(
    ("chosen", "count"), [(None, 3), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("GPU-a, GPU-b", 2), ("0,1,2,3,4", 3)]
)
def test_visible_gpus_are_those_that_cuda_visible_devices_admits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, chosen: str | None, count: int
) -> None:
    for number in range(3):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    monkeypatch.setattr(select, "Path", lambda _: tmp_path)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == count


def test_there_is_always_a_processor() -> None:
    assert usable_cpus() >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "slurm"}, "slurm"),
        ({"device": "tpu"}, "tpu"),
        ({"workers": 0}, "at least 1"),
        ({"workers": -2}, "at least 1"),
        ({"runtime": "local", "address": "auto"}, "--address"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunOptions(**options)


@pytest.mark.parametrize(
    ("runtime", "options", "gpus", "shape"),
    [
        ("local", {}, False, (6, False)),
        ("local", {}, True, (6, True)),
        ("local", {"device": "cpu"}, True, (6, False)),
        ("ray", {}, True, (1, False)),  # the cluster's GPUs are not known yet
        ("ray", {"device": "cuda"}, False, (4, True)),
        ("ray", {"cpus_per_worker": 3}, False, (3, False)),
        ("ray", {"device": "cuda", "cpus_per_worker": 9}, False, (9, True)),
    ],
)
def test_what_a_worker_is_expected_to_have(
    monkeypatch: pytest.MonkeyPatch, runtime: Any, options: Any, gpus: bool, shape: tuple[int, bool]
) -> None:
    monkeypatch.setattr(select, "usable_cpus", lambda: 6)
    monkeypatch.setattr(select, "may_have_gpus", lambda: gpus)
    assert expected_shape(RunOptions(**options), runtime) == WorkerShape(*shape)
