"""What makes two runs the same: a document to compare before unfinished pieces are continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from blake3 import blake3

from rv_distributed.plan import Plan

#: Counts up when a change to this package changes the bytes or the records that a plan leads to.
FORMAT = 3


def identity_of(plan: Plan, output: int) -> dict[str, Any]:
    """Everything that decides the bytes of one output and where its pieces lie, as plain JSON values.

    Other outputs of the same run are not part of it, so a sweep can be continued one output at a time.
    """
    layout = blake3()
    for shard in plan.shards:
        layout.update(shard.name.encode()).update(shard.header)
    for tensor in plan.tensors:
        rule, _ = tensor.rule_in(output)
        weights = [tuple(segment.weights[output]) for segment in tensor.segments] if rule == "combine" else None
        # Where one was matched by a rule or decoded, small files have decided that, and they are in no fingerprint.
        decided = tensor.segments if tensor.matched or tensor.decoded else ()
        layout.update(repr((tensor.name, rule, weights, decided)).encode())
    for piece in plan.pieces:
        layout.update(repr(piece).encode())
    return {
        "format": FORMAT,
        "versions": {name: metadata.version(name) for name in ("rv-distributed", "torch")},
        "operation": plan.operation,
        "alphas": list(plan.alphas[output]),
        "options": dict(plan.options),
        "inputs": {
            f"{number}: {item.role}": {
                "uri": item.uri,
                "fingerprint": item.fingerprint,
                "files": {file.name: file.state for file in item.files},
            }
            for number, item in enumerate(plan.inputs)
        },
        "layout": layout.hexdigest(),
    }


def identity_digest(identity: Mapping[str, Any]) -> str:
    """The digest under which a manifest keeps the identity of the run that made it."""
    return blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()
