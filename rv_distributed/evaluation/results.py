"""The files of an evaluation: ``rv_eval.json`` with its outcome, ``rv_items.parquet`` with every item's answer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from rv_distributed.checkpoint.parquet import write_parquet
from rv_distributed.evaluation.model import Answers, Failed, Item, Pair
from rv_distributed.evaluation.outcome import Outcome, Row, Selected
from rv_distributed.evaluation.statistics import FORMULA, Difference, Estimate
from rv_distributed.storage.publish import write_durably

SCHEMA_VERSION: Final = 1
RESULTS_FILE: Final = "rv_eval.json"
ITEMS_FILE: Final = "rv_items.parquet"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation was, and what came of it."""

    created: str
    """ISO 8601, in UTC."""
    target: str
    vector: Mapping[str, str]
    """The roles of what it is made from, and their folders; empty where only the target was evaluated."""
    settings: Mapping[str, Any]
    """All that was asked for."""
    versions: Mapping[str, str]
    outcome: Outcome
    failed: tuple[Failed, ...] = ()

    def document(self) -> dict[str, Any]:
        """As JSON values; ``schemas/evaluation.schema.json`` describes them."""
        selected = self.outcome.selected
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "target": self.target,
            "vector": dict(self.vector),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "statistics": FORMULA,
            "split": self.outcome.split,
            "selected": selected
            and {
                **selected._asdict(),
                "development": [{"alpha": alpha, "accuracy": mean} for alpha, mean in selected.development.items()],
            },
            "rows": [_row_document(row) for row in self.outcome.rows],
            "failed": [one._asdict() for one in self.failed],
        }


def _row_document(row: Row) -> dict[str, Any]:
    compared = row.difference
    return {
        **row._asdict(),
        "model": row.model,
        "accuracy": row.accuracy._asdict(),
        "difference": compared and compared._asdict(),
    }


def read_evaluation(raw: bytes) -> Evaluation:
    """What `Evaluation.document` wrote. Raises ValueError when it is something else."""
    try:
        found = json.loads(raw, parse_constant=_refuse)
        if found["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"has schema version {found['schema_version']!r}, and this reads {SCHEMA_VERSION}")
        rows = tuple(_read_row(row) for row in found["rows"])
        chosen = found["selected"]
        selected = chosen and Selected(
            _number(chosen["alpha"]),
            {_number(one["alpha"]): _number(one["accuracy"]) for one in chosen["development"]},
            int(chosen["development_items"]),
            int(chosen["test_items"]),
        )
        return Evaluation(
            str(found["created"]),
            str(found["target"]),
            {str(role): str(folder) for role, folder in found["vector"].items()},
            dict(found["settings"]),
            {str(name): str(version) for name, version in found["versions"].items()},
            Outcome(rows, "test" if found["split"] == "test" else "all", selected),
            tuple(Failed(str(one["pair"]), str(one["cause"])) for one in found["failed"]),
        )
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"is no evaluation of rv: {error!r}") from error


def _read_row(row: Mapping[str, Any]) -> Row:
    accuracy, compared = row["accuracy"], row["difference"]
    stderr = accuracy["stderr"]
    return Row(
        str(row["task"]),
        None if row["perturbation"] is None else str(row["perturbation"]),
        _number(row["alpha"]),
        str(row["metric"]),
        int(row["perturbed"]),
        Estimate(_number(accuracy["mean"]), None if stderr is None else _number(stderr), int(accuracy["items"])),
        compared
        and Difference(
            _number(compared["mean"]),
            _number(compared["low"]),
            _number(compared["high"]),
            int(compared["gained"]),
            int(compared["lost"]),
            None if compared["p"] is None else _number(compared["p"]),
        ),
    )


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"holds {value!r} where a number belongs")
    return float(value)


def _refuse(name: str) -> Any:
    raise ValueError(f"holds {name}")


def write_results(out: str, evaluation: Evaluation, answers: Mapping[Pair, Answers]) -> None:
    """Write both files, the outcome last. Returns once they are on the device."""
    write_durably(os.path.join(out, ITEMS_FILE), items_table(answers))
    text = json.dumps(evaluation.document(), ensure_ascii=False, indent=2)
    write_durably(os.path.join(out, RESULTS_FILE), text.encode())


def items_table(answers: Mapping[Pair, Answers]) -> bytes:
    """A row for every model, task and item, as a Parquet file."""
    import pyarrow as pa

    types: dict[str, Any] = {
        **dict.fromkeys(("asked", "perturbation", "alpha", "metric", *Item._fields), pa.string()),
        "alpha": pa.float64(),
        "item": pa.int64(),
        "score": pa.float64(),
        "perturbed": pa.bool_(),
    }
    return write_parquet(_item_rows(answers), types)


def _item_rows(answers: Mapping[Pair, Answers]) -> Iterable[tuple[Any, ...]]:
    for pair, own in answers.items():
        for item in own.items:
            yield (pair.ask.task, pair.ask.perturbation, pair.variant.alpha, own.metric, *item)
