"""What makes two runs the same: a document to compare before unfinished pieces are continued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from blake3 import blake3

from rv_distributed.checkpoint.manifest import Manifest
from rv_distributed.checkpoint.uris import join
from rv_distributed.plan import Plan
from rv_distributed.recipe import show_alpha

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


def identity_in(manifest: Manifest, now: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest tells of the identity of the run that made it; all else as in ``now``."""
    told = {f"{number}: {item.role}": item for number, item in enumerate(manifest.inputs)}
    inputs = {
        key: {**now["inputs"].get(key, {}), "uri": item.uri, "fingerprint": item.fingerprint}
        for key, item in told.items()
    }
    alphas = list(manifest.alphas) or now["alphas"]  # an extract tells none
    asked = {"operation": manifest.operation, "alphas": alphas, "options": manifest.options}
    return {**now, **asked, "inputs": inputs, "versions": manifest.versions}


def identity_digest(identity: Mapping[str, Any]) -> str:
    """The digest under which a manifest keeps the identity of the run that made it."""
    return blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def difference(then: Mapping[str, Any], now: Mapping[str, Any], otherwise: str) -> str:
    """The first difference between two identities, in words: what was asked for, before what follows from it. Where it
    lies in nothing that has a name, it is ``otherwise``, or what depends on the tensor, of which a digest tells."""
    by_tensor = ["an alpha"] if None in now["alphas"] else []
    if now["options"].get("scale") == "by tensor":
        by_tensor.append("scale")
    unnamed = f"{' or '.join(by_tensor)} by tensor, or {otherwise}" if by_tensor else otherwise
    return next(_differences(then, now), unnamed)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    # Of another format, nothing else is known.
    yield from _changed("format of the pieces", then["format"], now["format"])
    yield from _changed("operation", then["operation"], now["operation"])
    yield from _changed("inputs", *(", ".join(map(_role, each["inputs"])) for each in (then, now)))
    inputs = [(_role(key), item, now["inputs"][key]) for key, item in then["inputs"].items()]
    for role, one, other in inputs:
        yield from _changed(role, one["uri"], other["uri"])
    for name in {**then["options"], **now["options"]}:
        yield from _changed(_option(name), *(each["options"].get(name) or "not given" for each in (then, now)))
    yield from _changed("alpha", *(_alphas(each["alphas"]) for each in (then, now)))
    for role, one, other in inputs:
        for name in {**one["files"], **other["files"]}:
            state, found = one["files"].get(name), other["files"].get(name)
            if state != found:
                path, odd = join(other["uri"], name), "new" if state is None else "gone" if found is None else ""
                yield f"{path} is {odd}" if odd else f"size or time of {path} changed, or it was replaced"
        if one["fingerprint"] != other["fingerprint"]:
            yield f"{role}: {other['uri']} has other weights"
    for name in now["versions"]:
        yield from _changed(name, then["versions"].get(name), now["versions"][name])


def _changed(what: str, then: object, now: object) -> Iterator[str]:
    if then != now:
        yield f"{what}: then {then!s:.120}, now {now!s:.120}"


def _role(key: str) -> str:
    return key.partition(": ")[2]


def _option(name: str) -> str:
    return name if name in ("normalize", "scale") else f"--{name.replace('_bytes', '_size').replace('_', '-')}"


def _alphas(alphas: Sequence[float | None]) -> str:
    return ", ".join("by tensor" if alpha is None else show_alpha(alpha) for alpha in alphas)
