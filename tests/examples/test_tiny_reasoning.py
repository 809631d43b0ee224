"""The example tiny_reasoning: its language and its model, and the whole of it with next to no training."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rv_distributed.evaluation.perturbations import PERTURBATIONS, perturb

FOLDER = Path(__file__).parents[2] / "examples/tiny_reasoning"
sys.path.append(str(FOLDER))

from figure import Series, figure  # noqa: E402
from model import TinyQwen2  # noqa: E402
from problems import (  # noqa: E402
    END,
    FORMATS,
    LONGEST,
    OMITTED,
    Demonstrations,
    Problem,
    Step,
    compact,
    decode,
    draw,
    encode,
    sentences,
    solve,
)
from study import show  # noqa: E402
from train import TOY, NotLearned, randomly_moved, train_base  # noqa: E402

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the example does: more only wait for each other on so small a model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


KNOWN = Problem("E", 4, (Step("B", "E", 1), Step("G", "B", 9)))


def test_a_chain_is_asked_and_solved_as_the_readme_says() -> None:
    assert [form(KNOWN, range(3)) for form in FORMATS] == [
        "E4,BE1,GB9?G:",
        "E=4;B=E+1;G=B+9;G?:",
        "E is 4. B is E+1. G is B+9. G?:",
    ]
    assert compact(KNOWN, [2, 0, 1]) == "GB9,E4,BE1?G:"
    assert KNOWN.answer == 4
    assert solve(KNOWN, random.Random(0), 0.0) == "B41=5,G59=4,#4"
    assert solve(KNOWN, random.Random(0), 1.0) == "G59=4,#4", "only steps that add 3 or less are left out"


def test_problems_are_what_they_say() -> None:
    rng = random.Random(3)
    left_out = easy = 0
    for _ in range(300):
        problem = draw(rng, rng.randint(1, LONGEST))
        assert len({problem.first, *(step.name for step in problem.steps)}) == len(problem.steps) + 1
        assert problem.answer == (problem.value + sum(step.operand for step in problem.steps)) % 10
        text = solve(problem, rng, OMITTED)
        assert decode([*encode(text), END, 7]) == text
        left_out += len(problem.steps) - text.count("=")
        easy += sum(step.operand <= 3 for step in problem.steps)
    assert left_out / easy == pytest.approx(OMITTED, abs=0.08)


def test_demonstrations_are_of_all_kinds() -> None:
    shown = Demonstrations(LONGEST, FORMATS, 0.5, shuffled=0.5)
    examples = [shown.draw(random.Random(n)) for n in range(200)]
    prompts = [decode(example.prompt) for example in examples]
    assert all(prompt.endswith(":") for prompt in prompts)
    assert all(example.solution[-1] == END for example in examples)
    assert {len(prompt) for prompt in prompts if "," in prompt} == {4 * n + 5 for n in range(1, LONGEST + 1)}
    batch = next(shown.batches(random.Random(0), 8))
    assert len(batch) == 8


def test_every_perturbation_asks_the_same_in_the_tiny_language() -> None:
    rng = random.Random(5)
    for _ in range(50):
        problem = draw(rng, rng.randint(2, LONGEST))
        question = sentences(problem, range(len(problem.steps) + 1)).removesuffix(":")
        for name in PERTURBATIONS:
            asked = perturb(name, question, 0)
            assert asked.text != question
            encode(asked.text)  # it has no character that the model does not know
            facts = [fact.split() for fact in asked.text.removesuffix("?").split(". ")]
            values = {name: right for name, _, right in facts[:-1]}
            name = facts[-1][0]
            steps = 0
            while not values[name].isdigit():
                name, plus = values[name].split("+")
                steps += int(plus)
            assert (int(values[name]) + steps) % 10 == problem.answer


@quiet
def test_the_model_is_transformers_own_and_so_are_its_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = TinyQwen2(3)
    model.save(tmp_path / "model")
    loaded, info = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"), output_loading_info=True)
    assert type(loaded).__name__ == "Qwen2ForCausalLM"
    assert not any(info.values()), info
    assert 300_000 < sum(parameter.numel() for parameter in loaded.parameters()) < 320_000
    texts = ["E4,BE1,GB9?G:", "A1,BA2,CB3?C:"]
    tokens = torch.tensor([encode(text) for text in texts])
    with torch.no_grad():
        ours, theirs = model(tokens)[0], loaded.eval()(tokens).logits
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=2e-5)
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "model"))
    text = "E is 4.  B is E+1. #5,;=:?"
    assert tokenizer(text)["input_ids"] == encode(text)
    assert tokenizer.decode([*encode(text), END, 0], skip_special_tokens=True) == text


@quiet
def test_generation_drops_rows_that_are_finished_and_changes_nothing(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = TinyQwen2(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else 1)  # so that answers vary, and some end early
    model.save(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model")).eval()
    rng = random.Random(0)
    prompts = [encode(compact(draw(rng, 2), range(3))) for _ in range(12)]
    made = model.generate(prompts, 20)
    wanted = loaded.generate(torch.tensor(prompts), do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert len({len(one) for one in made}) > 3
    for own, other in zip(made, wanted[:, len(prompts[0]) :].tolist(), strict=True):
        assert own == other[: len(own)]


def test_the_random_vector_is_as_long_as_the_donors_in_each_tensor() -> None:
    reference, donor = TinyQwen2(5), TinyQwen2(6)
    moved = randomly_moved(reference, donor, 0)
    for own, there, other in zip(reference.parameters(), donor.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close((other - own).norm(), (there - own).norm(), rtol=1e-4, atol=1e-5)
        assert (there - own).norm() == 0 or not torch.equal(other, there)


def test_means_come_with_their_standard_errors() -> None:
    assert show([0.5]) == "0.50"
    assert show([0.2, 0.4, 0.6]) == f"0.40 ± {0.2 / 3**0.5:.2f}"


def test_the_figure_has_every_point_in_its_place() -> None:
    drawn = figure([Series("one", [(-1.0, 0.0, 0.0), (0.0, 0.5, 0.25), (1.0, 1.0, 0.0)])], x="", y="")
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    across, up = ([float(one[axis]) for one in circles] for axis in (0, 1))
    assert across[1] - across[0] == across[2] - across[1] > 100
    assert up[0] - up[1] == up[1] - up[2] > 100
    # A quarter of the axis up and down.
    low, high = (up[1] + sign * (up[0] - up[1]) / 2 for sign in (1, -1))
    assert f'<path d="M{across[1]:.1f} {low:.1f}V{high:.1f}M' in drawn


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_study_runs_and_counts_what_failed(tmp_path: Path) -> None:
    """One seed of next to no training, and one that is known not to learn."""
    out = tmp_path / "study"
    out.mkdir()
    command = [sys.executable, str(FOLDER / "study.py"), "--toy", "--problems", "6", "--out", str(out), "--seeds", "7"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500, check=False)
    assert done.returncode == 0, (done.stderr, (out / "seed7.log").read_text())
    seed = out / "seed7"
    assert {"vector", "applied", "transferred", "eval", "eval-random", "eval-full"} <= {p.name for p in seed.iterdir()}
    rows = json.loads((seed / "eval/rv_eval.json").read_bytes())["rows"]
    assert len(rows) == 8 * 5
    text = (out / "README.md").read_text(encoding="utf-8")
    assert "1 seed (7), 0 failed" in text
    assert text.count("| target + v |") == 3
    assert (out / "accuracy.svg").read_text(encoding="utf-8").count("<circle") == 8 * 5
    assert "tiny_chains: accuracy over alpha" in (seed / "report.html").read_text(encoding="utf-8")
    (out / "seed8.not-learned").write_text("the base's accuracy is 0.80, below 0.85")
    before = (seed / "report.html").stat().st_mtime_ns
    done = subprocess.run([*command, "8"], capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 seed (7), 1 failed: seed 8: the base's accuracy is 0.80, below 0.85." in done.stdout
    assert (seed / "report.html").stat().st_mtime_ns == before


def test_a_base_that_does_not_learn_is_not_gone_on_with() -> None:
    with pytest.raises(NotLearned, match=r"chains of up to 2 were not learned in 3 steps: accuracy 0\.\d\d"):
        train_base(5, TOY._replace(stages=(2,), stage_steps=3, passes=1.1))
    with pytest.raises(NotLearned, match=r"the base's accuracy is 0\.\d\d, below 1.1"):
        train_base(5, TOY._replace(stage_steps=1, sound=1.1))
