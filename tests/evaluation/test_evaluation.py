"""Whole evaluations of small models through ``rv eval``: scores by plain transformers, resume, failures, refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from eval_models import OWN, choices, write_model, write_tasks
from refusal import Done, run_rv
from schemas import check

import rv_distributed as rv
from rv_distributed.evaluation.job import EvaluationJob, Progress
from rv_distributed.evaluation.perturbations import perturb

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(600),
]
ALPHAS = (0.0, -1.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three models, a vector and tasks; what data sets keep stays here too."""
    import datasets

    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("target", "donor", "reference")):
        write_model(folder / name, seed, dtype="bfloat16")
    parents = (str(folder / "donor"), str(folder / "reference"))
    rv.extract(*parents, str(folder / "vector"), run_options=rv.RunOptions(runtime="local"))
    write_tasks(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """The same, to be spoilt."""
    shutil.copytree(place, tmp_path / "place", ignore=shutil.ignore_patterns("cache", "out*"))
    return write_tasks_again(tmp_path / "place")


def write_tasks_again(folder: Path) -> Path:
    """Tasks name their data by absolute paths."""
    shutil.rmtree(folder / "tasks")
    write_tasks(folder / "tasks")
    return folder


def rv_eval(place: Path, out: Path, *more: str | Path) -> Done:
    given = ("--target", place / "target", "--task-path", place / "tasks", "--out", out, *OWN)
    return run_rv("eval", *given, *more)


def moved(place: Path) -> tuple[str | Path, ...]:
    return ("--donor", place / "donor", "--reference", place / "reference", "--alpha", "0.5,1.0", "--minus")


def documents(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "tasks/docs.jsonl").read_text().splitlines()]


def items(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / "rv_items.parquet").to_pylist()
    return found


@pytest.fixture(scope="module")
def written(place: Path) -> Path:
    """An evaluation with models on disk."""
    out = place / "out"
    done = rv_eval(place, out, *moved(place), "--tasks", "tiny_choice,tiny_text")
    assert done.status == 0, done.stderr
    return out


def test_scores_are_those_of_plain_transformers_on_what_rv_transfer_writes(place: Path, written: Path) -> None:
    rows = [row for row in items(written) if row["asked"] == "tiny_choice"]
    seen = set()
    for alpha in ALPHAS:
        folder = place / f"by-hand{alpha}"
        if alpha:
            target, donor, reference = (str(place / name) for name in ("target", "donor", "reference"))
            here = rv.RunOptions(runtime="local")
            rv.transfer(target, donor, reference, str(folder), alpha=alpha, run_options=here)
        wanted = choices(folder if alpha else place / "target", documents(place))
        assert [row["score"] for row in rows if row["alpha"] == alpha] == wanted
        seen.add(tuple(wanted))
    assert len(seen) == len(ALPHAS), "the models differ"


def test_the_outcome_sums_the_items_up(written: Path) -> None:
    document = check("evaluation", (written / "rv_eval.json").read_text())
    rows = items(written)
    assert len(document["rows"]) == 2 * len(ALPHAS)
    for row in document["rows"]:
        own = [item["score"] for item in rows if (item["asked"], item["alpha"]) == (row["task"], row["alpha"])]
        base = [item["score"] for item in rows if (item["asked"], item["alpha"]) == (row["task"], 0.0)]
        assert row["accuracy"]["mean"] == pytest.approx(sum(own) / len(own))
        if row["alpha"]:
            assert row["difference"]["mean"] == pytest.approx((sum(own) - sum(base)) / len(own))
            assert row["difference"]["gained"] == sum(one > other for one, other in zip(own, base, strict=True))
    assert set(document["vector"]) == {"donor", "reference"}
    assert document["failed"] == []


def test_in_memory_and_with_a_stored_vector_every_answer_is_the_same(place: Path, written: Path) -> None:
    out = place / "out-memory"
    alphas = ("--vector", place / "vector", "--alpha", "0.5,1.0", "--minus", "--in-memory")
    done = rv_eval(place, out, *alphas, "--tasks", "tiny_choice,tiny_text")
    assert done.status == 0, done.stderr
    assert items(out) == items(written)
    assert not (out / "models").exists()
    assert sorted(path.name for path in (written / "models").iterdir()) == ["alpha--1", "alpha-0.5", "alpha-1"]


def test_finished_pairs_are_kept_and_only_the_others_are_asked(place: Path, written: Path, tmp_path: Path) -> None:
    out = shutil.copytree(written, tmp_path / "out")
    records = sorted((out / "pairs").iterdir())
    assert len(records) == 2 * len(ALPHAS)
    records[0].unlink()
    records[1].write_text(records[1].read_text()[:-100])
    before = {path: path.stat().st_mtime_ns for path in records[2:]}
    # As left by a run that was killed while it wrote them.
    (out / "rv_items.parquet").rename(out / "rv_items.parquet.new")
    again = ("--tasks", "tiny_choice,tiny_text")
    done = rv_eval(place, out, *moved(place), *again)
    assert done.status == 0, done.stderr
    assert "8 of a model and a task, 6 of them finished already" in done.stdout
    assert done.stderr.splitlines()[0].startswith("   7/8")
    assert {path: path.stat().st_mtime_ns for path in records[2:]} == before
    assert items(out) == items(written)
    assert not (out / "rv_items.parquet.new").exists()
    # What is asked for anew is added; the rest is not asked again.
    done = rv_eval(place, out, *moved(place), *again, "--perturb", "reorder", "--dry-run", "--json")
    assert done.status == 2
    done = rv_eval(place, out, *moved(place), "--tasks", "tiny_text", "--perturb", "reorder", "--dry-run", "--json")
    pairs = check("prepared", done.stdout)["evaluation"]["pairs"]
    assert [pair["kept"] for pair in pairs] == [True, False] * len(ALPHAS)
    assert "12 of them asked" not in done.stdout


def test_an_evaluation_that_its_caller_cancels_keeps_what_is_finished(place: Path, tmp_path: Path) -> None:
    cancel, seen = threading.Event(), list[Progress]()
    options = rv.EvaluationOptions(
        (rv.Ask("tiny_choice"), rv.Ask("tiny_text")),
        means=rv.Means(task_paths=(str(place / "tasks"),), batch_size="16"),
        run=rv.RunOptions(runtime="local"),
    )

    def prepared() -> EvaluationJob:
        return rv.prepare_evaluation(str(place / "target"), rv.Vector(str(place / "vector")), str(out), options)

    def progress(now: Progress) -> None:
        seen.append(now)
        cancel.set()

    out = tmp_path / "out"
    with pytest.raises(rv.Cancelled, match="same call resumes"):
        prepared().run(progress, cancel)
    assert len(seen) == len(prepared().kept) == 1
    assert not (out / "rv_eval.json").exists()
    prepared().run()
    assert (out / "rv_eval.json").exists()


def test_an_evaluation_that_is_cancelled_before_it_begins_makes_no_model(place: Path, tmp_path: Path) -> None:
    cancel, out = threading.Event(), tmp_path / "out"
    cancel.set()
    options = rv.EvaluationOptions(
        (rv.Ask("tiny_text"),),
        means=rv.Means(task_paths=(str(place / "tasks"),)),
        run=rv.RunOptions(runtime="local"),
    )
    job = rv.prepare_evaluation(str(place / "target"), rv.Vector(str(place / "vector")), str(out), options)
    with pytest.raises(rv.Cancelled):
        job.run(cancel=cancel)
    assert not list((out / "models").glob("alpha*"))


def test_a_changed_model_or_task_is_asked_again(copied: Path) -> None:
    out = copied / "out"
    tasks = ("--tasks", "tiny_choice")

    def kept() -> list[bool]:
        pairs = json.loads(rv_eval(copied, out, *tasks, "--dry-run", "--json").stdout)["evaluation"]["pairs"]
        return [pair["kept"] for pair in pairs]

    assert rv_eval(copied, out, *tasks).status == 0
    assert kept() == [True]
    docs = (copied / "tasks/docs.jsonl").read_text()
    (copied / "tasks/docs.jsonl").write_text(docs.replace("Which one?", "Which?"))
    assert kept() == [False]
    (copied / "tasks/docs.jsonl").write_text(docs)
    assert kept() == [True]
    weights = copied / "target/model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert kept() == [False]
    done = rv_eval(copied, out, *tasks, "--restart", "--dry-run", "--json")
    assert json.loads(done.stdout)["evaluation"]["pairs"][0]["kept"] is False


def test_a_pair_that_fails_does_not_lose_the_others_and_is_tried_again(copied: Path) -> None:
    out = copied / "out"
    # More than the model has positions for: the harness raises when it asks.
    refused = ("--tasks", "tiny_choice,tiny_text", "--gen-kwargs", "max_gen_toks=100000")
    done = rv_eval(copied, out, *refused, "--json")
    assert done.status == 1
    document = check("evaluated", done.stdout)
    assert document["status"] == "failed"
    assert [row["task"] for row in document["evaluation"]["rows"]] == ["tiny_choice"]
    (failed,) = document["evaluation"]["failed"]
    assert failed["pair"] == "tiny_text, target"
    assert "max_gen_toks" in failed["cause"] or "tokens to generate" in failed["cause"]
    assert "1 of 2 failed. Run the same command again: what is finished is kept." in done.stderr
    done = rv_eval(copied, out, *refused)
    assert done.status == 1
    assert "2 of a model and a task, 1 of them finished already" in done.stdout


def test_perturbed_questions_are_asked_and_recorded_with_true_answers(place: Path, tmp_path: Path) -> None:
    names = ("noise", "rename", "reorder", "distract")
    done = rv_eval(place, tmp_path / "out", "--tasks", "tiny_text", "--perturb", ",".join(names), "--perturb-seed", "3")
    assert done.status == 0, done.stderr
    rows = items(tmp_path / "out")
    docs = documents(place)
    for name in names:
        own = [row for row in rows if row["perturbation"] == name]
        texts = [perturb(name, doc["question"], 3).text for doc in docs]
        assert [row["prompt"] for row in own] == [f"{text}:" for text in texts]
        assert [row["wanted"] for row in own] == [doc["answers"][doc["right"]] for doc in docs]
        assert [row["perturbed"] for row in own] == [
            text != doc["question"] for text, doc in zip(texts, docs, strict=True)
        ]
        assert f"24 items, {sum(row['perturbed'] for row in own)} of them asked differently" in done.stdout


def test_options_come_from_the_environment_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RV_EVAL_TASKS": "tiny_choice", "RV_EVAL_LIMIT": "4", "RV_JSON": "1"}.items():
        monkeypatch.setenv(name, value)
    document = check("evaluated", rv_eval(place, tmp_path / "out").stdout)
    assert document["status"] == "evaluated"
    (row,) = document["evaluation"]["rows"]
    assert (row["task"], row["alpha"], row["accuracy"]["items"]) == ("tiny_choice", 0.0, 4)
    assert document["evaluation"] == json.loads((tmp_path / "out/rv_eval.json").read_bytes())


def test_consent_to_run_code_is_given_on_the_command_line_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RV_EVAL_CONFIRM_RUN_UNSAFE_CODE", "HF_ALLOW_CODE_EVAL"):
        monkeypatch.setenv(name, "1")
    done = rv_eval(place, tmp_path / "out", "--tasks", "tiny_code")
    assert done.status == 2
    assert "say so with --confirm-run-unsafe-code" in done.stderr


def test_settings_reach_the_harness(place: Path, tmp_path: Path) -> None:
    more = ("--limit", "5", "--num-fewshot", "2", "--gen-kwargs", "max_gen_toks=1")
    done = rv_eval(place, tmp_path / "out", "--tasks", "tiny_text", *more)
    assert done.status == 0, done.stderr
    rows = items(tmp_path / "out")
    assert len(rows) == 5
    assert all(row["prompt"].count("Which one?") == 3 for row in rows)
    assert all(len(row["response"]) <= 1 for row in rows)


def test_alpha_is_selected_on_one_half(place: Path, tmp_path: Path) -> None:
    alphas = ("--vector", place / "vector", "--alpha", "0.5,1.0", "--select", "--in-memory")
    done = rv_eval(place, tmp_path / "out", *alphas, "--tasks", "tiny_choice")
    assert done.status == 0, done.stderr
    selected = check("evaluation", (tmp_path / "out/rv_eval.json").read_text())["selected"]
    assert selected["development_items"] + selected["test_items"] == 24
    means = {one["alpha"]: one["accuracy"] for one in selected["development"]}
    assert means[selected["alpha"]] == max(means.values())
    assert f"was chosen by its accuracy on {selected['development_items']} development items" in done.stdout
    assert f"{selected['test_items']} test items" in done.stdout
    assert "(chosen)" in done.stdout


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--tasks", "no_such_task"), "no_such_task: is no task of lm-evaluation-harness"),
        (("--tasks", "tiny_text", "--task-path", "no_such_folder"), "--task-path: there is no folder no_such_folder"),
        ((), "nothing to ask: give --tasks or --suite"),
        (("--suite", "papers"), "--suite: 'papers' is not one of paper"),
        (("--tasks", "tiny_text", "--perturb", "rhyme"), "'rhyme' is not one of noise, rename, reorder, distract"),
        (("--tasks", "tiny_text,tiny_text"), "given twice"),
        (("--tasks", "tiny_choice", "--perturb", "noise"), "tiny_choice: is multiple_choice; only generative tasks"),
        (("--tasks", "tiny_text", "--perturb", "noise", "--perturb-field", "x"), "has no text in the field 'x'"),
        (("--tasks", "tiny_code"), "runs code that the model writes"),
        (("--tasks", "tiny_code", "--confirm-run-unsafe-code"), "Set HF_ALLOW_CODE_EVAL=1"),
        (("--tasks", "tiny_text", "--minus"), "--minus and --select need a vector"),
        (("--tasks", "tiny_text", "--donor", "DONOR"), "give --vector, or --donor and --reference"),
        (("--tasks", "tiny_text", "--model-args", "trust_remote_code=True"), "trust_remote_code cannot be given here"),
        (("--tasks", "tiny_text", "--model-args", "max_length"), "--model-args: 'max_length' is not KEY=VALUE"),
        (("--tasks", "tiny_text", "--gen-kwargs", "temperature"), "--gen-kwargs: 'temperature' is not KEY=VALUE"),
        (("--tasks", "tiny_text", "--backend", "vllm"), "rv eval needs vllm"),
        (("--tasks", "tiny_text", "--backend", "vllm", "--in-memory"), "--in-memory goes with --backend hf"),
        (("--tasks", "tiny_text", "--in-memory", "--dtype", "float32"), "--dtype goes without --in-memory"),
        (("--tasks", "tiny_text", "--device", "cuda"), "torch sees no GPU here"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    place: Path, tmp_path: Path, more: tuple[str, ...], told: str
) -> None:
    given = [str(place / "donor") if text == "DONOR" else text for text in more]
    done = rv_eval(place, tmp_path / "out", *given)
    assert done.status == 2, done
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_imports_neither_torch_nor_ray(place: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom rv_distributed.cli import main\n"
        "try:\n    main()\nfinally:\n    print(sorted({'torch', 'ray'} & sys.modules.keys()), file=sys.stderr)"
    )
    # Whether there is a GPU only torch can tell, and only a run has to know.
    given = ("--target", place / "target", *moved(place), "--task-path", place / "tasks", "--out", tmp_path / "out")
    argv = [sys.executable, "-c", script, "eval", *given, "--tasks", "tiny_choice,tiny_text", "--device", "cuda"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(place / "cache")}
    done = subprocess.run(
        [*map(str, argv), "--runtime", "local", "--dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_models_are_loaded_from_local_folders_and_results_go_to_one(place: Path, tmp_path: Path) -> None:
    done = rv_eval(place, tmp_path / "out", "--tasks", "tiny_text", "--target", "s3://lab/target")
    assert done.status == 2
    assert "--target: s3://lab/target is no local folder" in done.stderr
    done = rv_eval(place, tmp_path / "out", "--tasks", "tiny_text", "--out", "gs://lab/out")
    assert done.status == 2
    assert "--out: gs://lab/out is no local folder" in done.stderr


def test_a_folder_of_something_else_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = rv_eval(place, tmp_path, "--tasks", "tiny_text")
    assert done.status == 2
    assert "holds notes.txt, which is not of an evaluation" in done.stderr
    inside = rv_eval(place, place / "target/out", *moved(place), "--tasks", "tiny_text")
    assert inside.status == 2
    assert "overlap" in inside.stderr


def test_all_tasks_that_cannot_be_loaded_are_named_at_once(copied: Path, tmp_path: Path) -> None:
    (copied / "tasks/docs.jsonl").unlink()
    done = rv_eval(copied, tmp_path / "out", "--tasks", "tiny_text,tiny_choice,tiny_code")
    assert done.status == 2
    assert "3 problems with the inputs" in done.stderr
    assert done.stderr.count("cannot be loaded") == 3
