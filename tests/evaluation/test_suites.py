"""The paper's suite: its tasks as the harness has them, asked with data of their form made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eval_models import write_model

from rv_distributed.errors import InputError
from rv_distributed.evaluation import EvaluationOptions, Means, prepare_evaluation
from rv_distributed.evaluation.harness import check_tasks
from rv_distributed.evaluation.suites import SUITES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.timeout(1200),
]
DATA: dict[str, dict[str, str]] = {
    "openai/gsm8k": {"question": "Ann has 1 pen and gets 2. How many?", "answer": "1 + 2 = 3\n#### 3"},
    "allenai/sciq": {
        "support": "Ice is water.",
        "question": "What is ice?",
        "correct_answer": "water",
        "distractor1": "air",
        "distractor2": "iron",
        "distractor3": "sand",
    },
    "SaylorTwift/bbh": {"input": "Which is true? (A) snow (B) rain List: pear apple", "target": "(A)"},
}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets of one item, in place of the Hub's."""
    import datasets

    def load(path: str, **_: Any) -> Any:
        if path not in DATA:
            raise ConnectionError(f"{path} is not here")
        one = datasets.Dataset.from_list([DATA[path]])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), one))

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("data")
def test_every_task_is_asked_zero_shot_and_has_the_score_that_the_suite_names(tmp_path: Path) -> None:
    asks = [ask for ask in SUITES["paper"] if ask.task != "humaneval"]
    assert {ask.num_fewshot for ask in asks} == {0}
    # All settings are as in the suite, but that a model of random weights stops soon.
    short = tuple(replace(ask, gen_kwargs="max_gen_toks=4" if ask.gen_kwargs else "") for ask in asks)
    model = write_model(tmp_path / "model", 0, max_position_embeddings=4096)
    job = prepare_evaluation(str(model), None, str(tmp_path / "out"), EvaluationOptions(short))
    assert {ask.task: items for ask, (items, _) in job.items.items()} == {
        "gsm8k_cot_zeroshot": 1,
        "sciq": 1,
        "bbh_cot_zeroshot": 27,
    }
    found = job.run()
    assert found.failed == ()
    assert {row.task: row.metric for row in found.outcome.rows} == {
        "gsm8k_cot_zeroshot": "exact_match,flexible-extract",
        "sciq": "acc,none",
        "bbh_cot_zeroshot": "exact_match,flexible-extract",
    }


@pytest.mark.usefixtures("data")
def test_humaneval_is_known_to_the_harness() -> None:
    """It loads the code of its metric from the Hub; that is as far as it goes without a network."""
    (ask,) = [ask for ask in SUITES["paper"] if ask.task == "humaneval"]
    with pytest.raises(InputError) as refused:
        check_tasks([ask], Means(run_unsafe_code=True))
    assert "is no task of lm-evaluation-harness" not in str(refused.value)
