"""The command line as a user meets it: real processes, their output and their exit statuses."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rv_distributed import __version__
from rv_distributed.cli.app import report_error
from rv_distributed.demo import make_checkpoints
from rv_distributed.errors import Interrupted, RunError, RvError

RV = [sys.executable, "-c", "from rv_distributed.cli import main; main()"]


def rv(*args: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        [*RV, *map(str, args)], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_checkpoints(str(folder))
    return folder


def transfer_of(models: Path, out: Path, *more: str) -> list[str | Path]:
    roles = ("target", "donor", "reference")
    inputs = [text for role in roles for text in (f"--{role}", models / role)]
    return ["transfer", *inputs, "--out", out, *more]


def test_version_is_printed_without_a_command() -> None:
    shown = rv("--version")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"{__version__}\n", "")


def test_help_of_every_command_shows_an_example_or_what_it_does() -> None:
    commands = {"extract", "apply", "transfer", "run", "recipe", "inspect", "diff", "verify", "report", "bench"}
    commands |= {"push", "demo", "version", "submit"}
    listed = rv("--help")
    assert listed.returncode == 0
    assert all(command in listed.stdout for command in commands)
    for command in commands:
        shown = rv(command, "--help")
        assert shown.returncode == 0
        assert f"rv {command}" in shown.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["transfer", "--help"],
        ["run", "--help"],
        ["submit", "--help"],
        ["inspect", "MODELS/target"],
        ["DRY-RUN"],
    ],
    ids=lambda args: args[0],
)
def test_planning_commands_import_neither_torch_nor_ray(args: list[str], models: Path, tmp_path: Path) -> None:
    wanted = transfer_of(models, tmp_path / "out", "--dry-run") if args == ["DRY-RUN"] else args
    assert imported_by(*(str(arg).replace("MODELS", str(models)) for arg in wanted)) == []


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_a_run_on_processors_imports_no_torch(compute_dtype: str, models: Path, tmp_path: Path) -> None:
    argv = transfer_of(models, tmp_path / "out", "--runtime", "local", "--device", "cpu", "--rounding", "stochastic")
    assert imported_by(*map(str, argv), "--compute-dtype", compute_dtype) == ["pyarrow"]


def imported_by(*argv: str) -> list[str]:
    """Which of the heavy libraries a command imports."""
    script = (
        "import sys\nfrom rv_distributed.cli import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(*sorted({'torch', 'ray', 'pyarrow'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].split()


def test_extract_apply_and_transfer_agree_and_verify(models: Path, tmp_path: Path) -> None:
    vector, applied, moved = tmp_path / "vector", tmp_path / "applied", tmp_path / "moved"
    parents: list[str | Path] = ["--donor", models / "donor", "--reference", models / "reference"]
    assert rv("extract", *parents, "--out", vector).returncode == 0
    done = rv("apply", "--target", models / "target", "--vector", f"{vector}=0.7", "--out", applied)
    assert done.returncode == 0, done.stderr
    done = rv(*transfer_of(models, moved, "--alpha", "0.7"))
    assert done.returncode == 0, done.stderr
    assert "done in" in done.stdout
    assert "O = T + 0.7·(A − B)" in done.stdout
    assert (applied / "model.safetensors").read_bytes() == (moved / "model.safetensors").read_bytes()
    for out in (vector, applied, moved):
        assert rv("verify", out).returncode == 0


def test_rounding_and_arithmetic_are_shown_recorded_and_verified(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--rounding", "stochastic", "--seed", "9", "--compute-dtype", "float64", "--dtype", "bfloat16"]
    done = rv(*transfer_of(models, out, *options, "--alpha", "0.3"))
    assert done.returncode == 0, done.stderr
    assert "computed in float64, rounded stochastically with seed 9" in done.stdout
    recorded = json.loads((out / "rv_manifest.json").read_bytes())
    assert recorded["alphas"] == [0.3]
    assert [recorded["options"][name] for name in ("rounding", "seed", "compute_dtype")] == [
        "stochastic",
        "9",
        "float64",
    ]
    again = rv(*transfer_of(models, out, *options, "--alpha", "0.3"))
    assert "up to date" in again.stdout
    assert rv(*transfer_of(models, out, *options, "--alpha", "0.3", "--seed", "8")).returncode == 2
    checked = rv("verify", out, "--against-inputs")
    assert checked.returncode == 0, checked.stderr


def test_several_alphas_make_the_outputs_that_single_runs_make(models: Path, tmp_path: Path) -> None:
    done = rv(*transfer_of(models, tmp_path / "a-{alpha}", "--alpha", "0,0.5,-1.0"))
    assert done.returncode == 0, done.stderr
    for alpha in ("0", "0.5", "-1.0"):
        assert rv(*transfer_of(models, tmp_path / f"one-{alpha}", f"--alpha={alpha}")).returncode == 0
        files = [tmp_path / f"{kind}-{alpha}" / "model.safetensors" for kind in ("a", "one")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert rv("verify", tmp_path / f"a-{alpha}").returncode == 0


def test_json_puts_one_document_on_stdout(models: Path, tmp_path: Path) -> None:
    planned = rv(*transfer_of(models, tmp_path / "out", "--json", "--dry-run"))
    assert json.loads(planned.stdout)["status"] == "planned"
    assert not (tmp_path / "out").exists()
    done = json.loads(rv(*transfer_of(models, tmp_path / "out", "--json")).stdout)
    stored = json.loads((tmp_path / "out" / "rv_manifest.json").read_bytes())
    assert done["status"] == "done"
    assert done["outputs"] == [{"path": str(tmp_path / "out"), "up_to_date": False, "manifest": stored}]
    assert json.loads(rv("verify", tmp_path / "out", "--json").stdout)["status"] == "verified"
    assert json.loads(rv("inspect", tmp_path / "out", "--json").stdout)["manifest"] == stored


def test_bad_input_is_reported_whole_with_status_2_and_nothing_written(models: Path, tmp_path: Path) -> None:
    inputs: list[str | Path] = ["--target", models / "target"]
    inputs += ["--donor", tmp_path / "gone", "--reference", tmp_path / "lost"]
    done = rv("transfer", *inputs, "--out", tmp_path / "out", "--json")
    assert done.returncode == 2
    assert [Path(p["where"]).name for p in json.loads(done.stdout)["problems"]] == ["gone", "lost"]
    assert "2 problems" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--alpha", "much"], "not a number"),
        (["--alpha", "inf"], "not a finite float32"),
        (["--alpha", "0.5,0.7"], "{alpha}"),
        (["--alpha", "0.5,1,0.50"], "--alpha: 0.5 and 0.50 are the same number; give it once"),
        (["--alpha", "0.5", "--alpha", "0.5"], "--alpha: 0.5 and 0.5 are the same number; give it once"),
        (["--max-shard-size", "big"], "--max-shard-size"),
        (["--memory-budget", "1kB"], "--memory-budget"),
        (["--include", "("], "not a regular expression"),
        (["--include", "nothing matches"], "leave no tensor"),
        (["--dtype", "int8"], "int8"),
        (["--workers", "0"], "--workers"),
        (["--rounding", "up"], "--rounding"),
        (["--seed", "3"], "--rounding stochastic"),
        (["--rounding", "stochastic", "--seed=-1"], "--seed"),
        (["--compute-dtype", "float16"], "--compute-dtype"),
        (["--no-such-option"], "no-such-option"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_exit_with_2_and_say_why(models: Path, tmp_path: Path, more: list[str], told: str) -> None:
    done = rv(*transfer_of(models, tmp_path / "out", *more))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_vector_whose_name_reads_like_an_alpha_is_found(models: Path, tmp_path: Path) -> None:
    vector = tmp_path / "sp ace" / "v=0.5"
    inputs = ("--donor", models / "donor", "--reference", models / "reference")
    assert rv("extract", *inputs, "--out", vector).returncode == 0
    args = ("apply", "--target", models / "target", "--out", tmp_path / "out", "--dry-run", "--vector")
    assert "O = T + 1·V1" in rv(*args, vector).stdout
    assert "O = T + 0.25·V1" in rv(*args, f"{vector}=0.25").stdout


@pytest.mark.parametrize("name", ["{alfa}", "{}", "{alpha:.2f}"])
def test_a_name_in_braces_that_stands_for_nothing_is_refused(models: Path, tmp_path: Path, name: str) -> None:
    done = rv(*transfer_of(models, tmp_path / f"e1-{name}"))
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert f"--out: {name} stands for nothing here, only {{alpha}}" in done.stderr


def test_a_folder_that_exists_may_have_braces_in_its_name(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs {2024}" / "out-{alpha}"
    command = [*transfer_of(models, out), "--dry-run", "--alpha", "0.5"]
    told = "--out: {2024} stands for nothing here, only {alpha}. Only a folder that exists may have braces in its name."
    assert told in rv(*command).stderr
    out.parent.mkdir()
    assert f"{out.parent}/out-0.5\n" in rv(*command).stdout


def test_an_extract_has_no_alpha_to_name_its_output_by(models: Path, tmp_path: Path) -> None:
    done = rv(
        "extract", "--donor", models / "donor", "--reference", models / "reference", "--out", tmp_path / "{alpha}"
    )
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "--out: {alpha} stands for nothing here" in done.stderr


def test_a_uri_with_options_may_have_an_alpha(models: Path, tmp_path: Path) -> None:
    args: list[str | Path] = ["apply", "--target", models / "target", "--out", tmp_path / "out"]
    vectors = ["--vector", "s3:///v?anonymous=1", "--vector", "s3:///w?region=x=0.5"]
    assert "s3:///v?anonymous=1 names no bucket" in rv(*args, *vectors[:2]).stderr
    assert "s3:///w?region=x names no bucket" in rv(*args, *vectors[2:]).stderr


def test_an_existing_output_is_refused_then_overwritten(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert rv(*transfer_of(models, out, "--alpha", "0.5")).returncode == 0
    before = (out / "model.safetensors").read_bytes()
    refused = rv(*transfer_of(models, out, "--alpha", "1"))
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert (out / "model.safetensors").read_bytes() == before
    assert rv(*transfer_of(models, out, "--alpha", "1", "--overwrite")).returncode == 0
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verify_exits_with_3_and_names_the_tensor_of_a_flipped_byte(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert rv(*transfer_of(models, out)).returncode == 0
    with open(out / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    done = rv("verify", out, "--json")
    assert done.returncode == 3
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["tensor"] == "model.norm.weight"
    assert finding["stop"] == (out / "model.safetensors").stat().st_size


def on_a_terminal(*args: str | Path) -> tuple[subprocess.CompletedProcess[bytes], bytes]:
    """What ``rv ARGS`` did, and what it drew on its stderr."""
    leader, follower = pty.openpty()
    argv = [*RV, *map(str, args)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=follower, timeout=120, check=False)
    os.write(follower, b"\n")  # there is something to read
    os.close(follower)
    drawn = os.read(leader, 65536)
    os.close(leader)
    return done, drawn


def test_a_terminal_gets_a_bar_and_the_output_is_the_same(models: Path, tmp_path: Path) -> None:
    done, drawn = on_a_terminal(*transfer_of(models, tmp_path / "out"))
    assert done.returncode == 0
    assert b"MB" in drawn
    assert b"Traceback" not in drawn
    assert rv("verify", tmp_path / "out").returncode == 0


@pytest.mark.parametrize(("option", "drawn"), [("--json", True), ("--quiet", False)])
def test_a_comparison_on_a_terminal_has_a_bar_and_the_same_stdout(models: Path, option: str, drawn: bool) -> None:
    args: tuple[str | Path, ...] = ("diff", models / "donor", models / "reference", option)
    done, seen = on_a_terminal(*args)
    assert done.returncode == 0
    assert done.stdout.decode() == rv(*args).stdout
    assert (b"MB" in seen) == drawn
    assert b"Traceback" not in seen


def test_the_demo_ends_with_the_same_bytes_both_ways(tmp_path: Path) -> None:
    done = rv("demo", "--out", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert "applied and transferred: the same bytes" in done.stdout
    again = rv("demo", "--out", tmp_path / "demo")
    assert again.returncode == 2
    assert "already exists" in again.stderr


#: ``rv`` on a storage that fails in the middle of a verify, or of a run.
FAILING = """
import errno, sys
import rv_distributed.verification as verification
from rv_distributed.staging.posix import PosixStaging

def fail(*_, **__):
    raise OSError(errno.EIO, "Input/output error", "/models/shard")

verification.verify = fail
PosixStaging.finished = fail
from rv_distributed.cli import main
main()
"""


@pytest.mark.parametrize(("command", "resumable"), [("verify", False), ("transfer", True)])
def test_only_a_run_that_can_be_resumed_says_so(command: str, resumable: bool, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = ["verify", out] if command == "verify" else transfer_of(models, out)
    argv = [sys.executable, "-c", FAILING, *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "/models/shard: Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    assert ("run the same command again to resume" in done.stderr) == resumable


@pytest.mark.parametrize(
    ("command", "resumable"),
    [("eval", True), ("push", True), ("demo", False), ("report", False), ("recipe", False), ("inspect", False)],
)
@pytest.mark.parametrize("error", [RunError("failed"), Interrupted(signal.SIGINT)])
def test_only_commands_that_resume_promise_it(
    command: str,
    resumable: bool,
    error: RvError,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["rv", command])
    assert report_error(error) == error.exit_status
    assert ("run the same command again to resume" in capsys.readouterr().err) == resumable


def test_progress_and_events_as_json_lines(models: Path, tmp_path: Path) -> None:
    done = rv(*transfer_of(models, tmp_path / "out", "--runtime", "ray", "--log-format", "json", "--json"))
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    came_up = [event for event in events if event["event"].endswith("is up")]
    assert came_up
    document = json.loads(done.stdout)
    named = {entry["worker"] for entry in document["workers"]}
    assert named <= {event["worker"] for event in came_up}
    assert sum(entry["pieces"] for entry in document["workers"]) == document["plan"]["pieces"]


def test_a_value_that_an_option_does_not_take_is_told_in_plain_words(models: Path, tmp_path: Path) -> None:
    told = "Invalid value for '--stats' (env var: 'RV_STATS'): 'most' is not one of 'full', 'basic', 'none'."
    given = rv(*transfer_of(models, tmp_path / "out", "--stats", "most"))
    assert (given.returncode, given.stdout) == (2, "")
    assert given.stderr.splitlines()[-1] == f"Error: {told}"
    from_environment = rv(*transfer_of(models, tmp_path / "out", "--json"), env={"RV_STATS": "most"})
    assert json.loads(from_environment.stdout)["error"]["message"] == told
    assert from_environment.stderr.splitlines()[-1] == f"Error: {told}"


@pytest.mark.parametrize("label", ["near", "=near"])
def test_a_node_label_has_a_key_and_a_value(models: Path, tmp_path: Path, label: str) -> None:
    done = rv(*transfer_of(models, tmp_path / "out", "--node-label", label))
    assert done.returncode == 2
    assert "--node-label" in done.stderr
    assert "KEY=VALUE" in done.stderr
