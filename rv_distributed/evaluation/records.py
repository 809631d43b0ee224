"""Finished pairs, each a file of its own that appears when it is whole: what a rerun keeps."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from typing import Any, Final

from rv_distributed.evaluation.model import Answers, Item, Pair
from rv_distributed.storage.publish import write_durably

SCHEMA_VERSION: Final = 1
FOLDER: Final = "pairs"
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9.+-]+")


def record_path(out: str, pair: Pair) -> str:
    """Where a pair's answers go. The name says what it is to people; the identity in it decides."""
    name = _UNSAFE.sub("_", f"{pair.ask.task}+{pair.ask.perturbation or 'clean'}--alpha-{pair.variant.alpha:g}")
    return os.path.join(out, FOLDER, f"{name[:120]}--{pair.identity[:16]}.json")


def write_record(out: str, pair: Pair, answers: Answers) -> None:
    """Keep a pair's answers. Returns once they are on the device."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "identity": pair.identity,
        "alpha": pair.variant.alpha,
        "asked": asdict(pair.ask),
        "metric": answers.metric,
        "seconds": answers.seconds,
        "harness": answers.harness,
        "items": [item._asdict() for item in answers.items],
    }
    os.makedirs(os.path.join(out, FOLDER), exist_ok=True)
    write_durably(record_path(out, pair), json.dumps(document, ensure_ascii=False, indent=1).encode())


def read_record(out: str, pair: Pair) -> Answers | None:
    """The answers that an earlier run kept; None where there are none, or what is there is not whole."""
    try:
        with open(record_path(out, pair), encoding="utf-8") as file:
            document: dict[str, Any] = json.load(file)
        if document["identity"] != pair.identity or document["schema_version"] != SCHEMA_VERSION:
            return None
        items = tuple(Item(**item) for item in document["items"])
        return Answers(document["metric"], items, document["harness"], float(document["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
