"""What all operations share on the command line: plan summary, progress, closing summary, JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rv_distributed.bench import known_speed
from rv_distributed.checkpoint.manifest import Manifest, Timings
from rv_distributed.checkpoint.model import all_folders
from rv_distributed.checkpoint.uris import is_remote
from rv_distributed.cli.effort import effort_document, effort_table
from rv_distributed.cli.options import Running
from rv_distributed.cli.progress import progress_display
from rv_distributed.cli.terminal import hide_upload_bars, say, warn
from rv_distributed.errors import one_line
from rv_distributed.job import Job
from rv_distributed.outcome import oddities, show_measures
from rv_distributed.plan import PlanOptions
from rv_distributed.preparing import prepare
from rv_distributed.recipe import ByTensor, Recipe, in_words
from rv_distributed.reduce import formula
from rv_distributed.storage.places import Room
from rv_distributed.units import plural, show_bytes, show_count, show_seconds
from rv_distributed.watching import Share


def run(recipe: Recipe, plan_options: PlanOptions, outs: Sequence[str], common: Running) -> None:
    """Prepare, show the plan, run, show what became of it. Raises whatever the library raises."""
    talks = not (common.json or common.quiet)
    began = time.monotonic()
    job = prepare(recipe, outs, plan_options, common.run_options(), dry_run=common.dry_run)
    for warning in job.warnings:
        warn(f"warning: {one_line(warning)}")
    # A run finds out when it takes the places.
    kept = job.unfinished() if common.dry_run else 0
    if talks:
        say(plan_summary(job, kept))
    job.check_space()
    if common.dry_run:
        if common.json:
            document = {"schema_version": 1, "status": "planned", "plan": plan_document(job), "pieces_kept": kept}
            say(json.dumps(document, indent=2))
        return
    if job.pushes and not talks:
        hide_upload_bars()
    with progress_display(job.bytes_out, common.log_format, shown=not common.quiet) as display:
        manifests = job.run(display)
    odd = [text for out, manifest in zip(_places(job), manifests, strict=True) for text in oddities(out, manifest)]
    for warning in odd:
        warn(f"warning: {one_line(warning)}")
    if talks:
        say(closing_summary(job, manifests, display.workers, time.monotonic() - began))
    if common.json:
        outputs = [
            {"path": out, "up_to_date": number in job.complete, "manifest": asdict(manifest)}
            for number, (out, manifest) in enumerate(zip(_places(job), manifests, strict=True))
        ]
        document = {"schema_version": 1, "status": "done", "plan": plan_document(job), "outputs": outputs}
        say(json.dumps({**document, "workers": effort_document(display.workers), "warnings": odd}, indent=2))


def plan_summary(job: Job, kept: int) -> str:
    """What is going to happen, for people; ``kept`` pieces are there already."""
    formulas = "; ".join(dict.fromkeys(formula(job.plan, number) for number in range(len(job.outs))))
    rows = [("operation", f"{job.plan.operation}: {formulas}")]
    if special := _arithmetic(job):
        rows.append(("arithmetic", special))
    for item in job.plan.inputs:
        checkpoint = next(c for c in all_folders(job.opened.values()) if c.uri == item.uri)
        facts = f"{show_count(checkpoint.parameters)} parameters, {'/'.join(checkpoint.dtypes)}"
        rows.append((item.role, f"{item.uri}  ({facts}, {show_bytes(checkpoint.weight_bytes)})"))
    rows += [("output", _output(job, number)) for number in range(len(job.outs))]
    rows.append(("tensors", _tensors(job)))
    if others := [tensor.name for tensor in job.plan.tensors if tensor.rule in ("cast", "copy")]:
        rows.append(("", f"not computed: {_some(others)}"))
    rows += _rules(job)
    if names := [name for name, _ in job.plan.left_out]:
        rows.append(("left out", f"{plural(len(names), 'tensor')} with no place in the output: {_some(names)}"))
    if job.plan.giver != job.opened[job.recipe.frame].uri:
        rows.append(("sidecars", f"{len(job.plan.sidecars)}, those of {job.plan.giver} but for config and code"))
    if files := [f"{name} ({why})" for name, why in job.plan.files_left_out]:
        rows.append(("not copied", f"{plural(len(files), 'file')}: {_some(files)}"))
    shards, pieces, rooms = len(job.plan.shards), len(job.plan.pieces), job.rooms
    each = " each" if len(job.outs) > 1 else ""
    rows += [
        ("read", show_bytes(job.bytes_in)),
        ("write", f"{show_bytes(job.bytes_out)}, in {plural(shards, 'file')} and {plural(pieces, 'piece')}{each}"),
        *([("resumes", f"{kept} of {plural(pieces, 'piece')} {'is' if kept == 1 else 'are'} there")] if kept else []),
        ("free disk", ", ".join(_room(room, len(rooms)) for room in rooms) or "none needed"),
        ("runtime", _runtime(job)),
    ]
    width = max(10, *(len(label) for label, _ in rows))
    return "\n".join(f"{label:>{width}}  {one_line(text)}" for label, text in rows)


def _rules(job: Job) -> Iterator[tuple[str, str]]:
    """Of each rule by which tensors were matched, what it did most."""
    for rule in dict.fromkeys(rule for rule, _ in job.plan.rules):
        texts = [text for other, text in job.plan.rules if other == rule]
        yield from zip([rule, "", ""], texts, strict=False)
        if len(texts) > 3:
            yield "", f"and {len(texts) - 3} more"


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + (", …" if len(texts) > 3 else "")


def _places(job: Job) -> list[str]:
    """Where the outputs are in the end."""
    return [str(job.pushes.get(number, out)) for number, out in enumerate(job.outs)]


def _output(job: Job, number: int) -> str:
    out, place = job.outs[number], job.pushes.get(number)
    text = f"{place}, made in {out} and then pushed" if place is not None else out
    notes = ["up to date"] if number in job.complete else []
    alphas = enumerate(job.recipe.alphas[number], 1)
    notes += [f"α{vector} {in_words(alpha)}" for vector, alpha in alphas if isinstance(alpha, ByTensor)]
    if _varies(job):
        rules = [tensor.rule_in(number)[0] for tensor in job.plan.tensors]
        notes.append(_counts(rules))
    return f"{text}  ({'; '.join(notes)})" if notes else text


def _varies(job: Job) -> bool:
    """Whether a tensor may be computed in one output and not in another."""
    return len(job.outs) > 1 and any(None in row for row in job.plan.alphas)


def _counts(rules: Sequence[str]) -> str:
    counts = {"computed": rules.count("combine"), "cast": rules.count("cast"), "copied": rules.count("copy")}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"


def _room(room: Room, count: int) -> str:
    return show_bytes(room.free) + (f" at {room.folder}" if count > 1 else "")


def _tensors(job: Job) -> str:
    text = _counts([tensor.rule for tensor in job.plan.tensors])
    text += " in one output or another" if _varies(job) else ""
    reasons: dict[str, int] = {}
    for tensor in job.plan.tensors:
        if tensor.why and tensor.rule != "scale":
            reasons[tensor.why] = reasons.get(tensor.why, 0) + 1
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"{text} ({why})" if why else text


def _arithmetic(job: Job) -> str:
    """What is not the default of it."""
    dtype, rounding, seed, _ = job.plan.arithmetic
    texts = [f"computed in {dtype}"] if dtype != "float32" else []
    texts += [f"rounded stochastically with seed {seed}"] if rounding == "stochastic" else []
    return ", ".join(texts)


def _runtime(job: Job) -> str:
    buffers = show_bytes(job.sizing.buffer_bytes)
    if job.runtime == "local":
        return f"local, {plural(job.sizing.streams, 'thread')}, {buffers} of buffers"
    where = job.options.address or "RAY_ADDRESS or this machine"
    actors = plural(job.options.workers, "worker") if job.options.workers else "a worker for each GPU or CPU"
    return f"ray at {where}, {actors}, {buffers} of buffers each"


def plan_document(job: Job) -> dict[str, Any]:
    """The plan as JSON values."""
    return {
        "operation": job.plan.operation,
        "formulas": [formula(job.plan, number) for number in range(len(job.outs))],
        "inputs": [{"role": i.role, "uri": i.uri, "fingerprint": i.fingerprint} for i in job.plan.inputs],
        "outputs": _places(job),
        "options": dict(job.plan.options),
        "tensors": len(job.plan.tensors),
        "computed": sum(tensor.rule == "combine" for tensor in job.plan.tensors),
        "copied": [
            {"tensor": t.name, "rule": t.rule, "why": t.why} for t in job.plan.tensors if t.rule in ("cast", "copy")
        ],
        "rules": [{"rule": rule, "what": what} for rule, what in job.plan.rules],
        "matched": [{"tensor": t.name, "how": t.matched} for t in job.plan.tensors if t.matched],
        "left_out": [{"tensor": name, "why": why} for name, why in job.plan.left_out],
        "sidecars": [{"file": file.name, "from": file.uri} for file in job.plan.sidecars],
        "files_left_out": [{"file": name, "why": why} for name, why in job.plan.files_left_out],
        "shards": [{"name": shard.name, "bytes": shard.size} for shard in job.plan.shards],
        "pieces": len(job.plan.pieces),
        "bytes_read": job.bytes_in,
        "bytes_written": job.bytes_out,
        "storage": [room._asdict() for room in job.rooms],
        "runtime": job.runtime,
        "buffer_bytes": job.sizing.buffer_bytes,
        "warnings": list(job.warnings),
    }


def closing_summary(job: Job, manifests: Sequence[Manifest], workers: Mapping[str, Share], seconds: float) -> str:
    """What happened, for people."""
    lines = []
    if job.todo:
        timings = manifests[job.todo[0]].timings
        lines = [*_effort(job, timings, seconds), *effort_table(workers, timings.run_s)]
    for number, (out, manifest) in enumerate(zip(_places(job), manifests, strict=True)):
        lines += [one_line(out), f"    {show_measures(manifest)}"]
        if number in job.complete:
            lines.append(f"    up to date, made at {manifest.created} by the same command; --overwrite makes it again")
    return "\n".join(lines)


def _effort(job: Job, timings: Timings, seconds: float) -> list[str]:
    speed = show_bytes(timings.bytes_written / max(timings.run_s, 1e-9))
    lines = [
        f"done in {show_seconds(seconds)}: {show_bytes(timings.bytes_read)} read, "
        f"{show_bytes(timings.bytes_written)} written ({speed}/s)"
    ]
    busy = timings.read_s + timings.compute_s + timings.write_s
    if busy:
        parts = {"reading": timings.read_s, "computing": timings.compute_s, "writing": timings.write_s}
        lines.append("of the workers' time: " + ", ".join(f"{part / busy:.0%} {what}" for what, part in parts.items()))
    storage = known_speed(os.path.dirname(job.outs[0]))
    if storage is not None and not any(is_remote(item.uri) for item in job.plan.inputs):
        least_s = show_seconds(storage.predict_s(timings.bytes_read, timings.bytes_written))
        took_s = show_seconds(timings.run_s)
        lines.append(f"by rv bench this storage takes {least_s} for it, with nothing cached; the run took {took_s}")
    if timings.pieces_kept:
        lines.append(f"{timings.pieces_kept} of {timings.pieces} pieces kept from an earlier run")
    return lines
