"""What a report says in words and tables: the same for HTML and Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rv_distributed.errors import one_line
from rv_distributed.outcome import oddities, show_measures
from rv_distributed.recipe import show_alpha
from rv_distributed.report.groups import ULPS_LABELS, Group, group_by, largest_vectors, place_of, ulps_of
from rv_distributed.report.reading import Output
from rv_distributed.report.throughput import shares
from rv_distributed.units import show_bytes, show_count, show_seconds

_MOST_SHOWN = 20


class Table(NamedTuple):
    """A table of texts, which come from files and are to be escaped."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def heading(output: Output) -> str:
    """What was made, in a line."""
    manifest, totals = output.manifest, output.manifest.totals
    of = f"{show_count(totals.parameters)} parameters in {totals.tensors} tensors, {show_bytes(totals.data_bytes)}"
    return one_line(f"{manifest.formula} · {of} · made {manifest.created}")


def verdict(output: Output) -> list[str]:
    """The measures in a line, and what is odd about them."""
    return [one_line(text) for text in (show_measures(output.manifest), *oddities(output.name, output.manifest))]


def tables_of(output: Output) -> Iterator[Table]:
    """All tables of one output; those without rows are left out."""
    found = [_largest(output), _layers(output), _ulps(output), _not_computed(output), _workers(output)]
    found += _provenance(output)
    return (table for table in found if table.rows)


def _largest(output: Output) -> Table:
    rows = [
        (
            row.name,
            row.dtype,
            "×".join(map(str, row.shape)) or "scalar",
            number(row.v_norm),
            number(row.v_t_ratio),
            number(row.realised_alpha),
            share(row.absorbed_fraction),
        )
        for row in largest_vectors(output.rows, _MOST_SHOWN)
    ]
    header = ("tensor", "dtype", "shape", "‖v‖", "‖v‖/‖t‖", "realised alpha", "lost in rounding")
    return Table("The longest vectors", header, rows)


def _layers(output: Output) -> Table:
    groups = group_by(output.rows, lambda row: place_of(row.name).layer)
    numbered = sorted((layer, group) for layer, group in groups.items() if layer is not None)
    named: list[tuple[str, Group]] = [(str(layer), group) for layer, group in numbered]
    named += [("in none", group) for layer, group in groups.items() if layer is None]
    rows = [
        (
            name,
            number(group.v_t_ratio),
            number(group.realised_alpha if output.manifest.totals.realised_alpha is not None else None),
            share(group.changed_fraction),
            share(group.absorbed_fraction),
        )
        for name, group in named
    ]
    return Table("By layer", ("layer", "‖v‖/‖t‖", "realised alpha", "changed", "lost in rounding"), rows)


def _ulps(output: Output) -> Table:
    counts = ulps_of(output.rows)
    total = sum(counts)
    rows = [
        (name, f"{count:,}", share(count / max(1, total))) for name, count in zip(ULPS_LABELS, counts, strict=False)
    ]
    return Table("Changes in units in the last place", ("units", "elements", "of the changes"), rows)


def _not_computed(output: Output) -> Table:
    reasons = Counter((row.rule, row.why) for row in output.rows if row.rule != "combine")
    examples: dict[tuple[str, str], list[str]] = {}
    for row in output.rows:
        if row.rule != "combine" and len(examples.setdefault((row.rule, row.why), [])) < 3:
            examples[row.rule, row.why].append(row.name)
    rows = [
        ({"copy": "copied", "cast": "cast"}[rule], why, str(count), ", ".join(examples[rule, why]))
        for (rule, why), count in reasons.most_common()
    ]
    left = Counter(entry.why for entry in output.manifest.left_out)
    rows += [
        ("left out", why, str(count), ", ".join([e.tensor for e in output.manifest.left_out if e.why == why][:3]))
        for why, count in left.most_common()
    ]
    return Table("What was not computed", ("", "why", "tensors", "for instance"), rows)


def _workers(output: Output) -> Table:
    run_s = max(output.manifest.timings.run_s, 1e-9)
    rows = []
    for one in shares(output.pieces)[:_MOST_SHOWN]:
        waited = ", ".join(show_seconds(seconds) for seconds in (one.read_s, one.compute_s, one.write_s))
        speed = f"{show_bytes(one.bytes_written / run_s)}/s"
        rows.append((one.worker, str(one.pieces), show_bytes(one.bytes_written), speed, waited, str(one.retried)))
    return Table("By worker", ("worker", "pieces", "written", "speed", "reading, computing, writing", "retried"), rows)


def _provenance(output: Output) -> list[Table]:
    manifest = output.manifest
    inputs = [(entry.role, entry.uri, entry.revision or "", entry.fingerprint) for entry in manifest.inputs]
    options = [(name, value) for name, value in manifest.options.items() if value]
    versions = list(manifest.versions.items())
    seals = [("manifest", manifest.digest), ("identity of the run", manifest.identity)]
    timings = manifest.timings
    run = [
        ("time", show_seconds(timings.run_s)),
        ("read", show_bytes(timings.bytes_read)),
        ("written", show_bytes(timings.bytes_written)),
        ("pieces", f"{timings.pieces}, of which {timings.pieces_kept} kept from an earlier run"),
    ]
    return [
        Table("Made from", ("role", "checkpoint", "revision", "fingerprint"), inputs),
        Table("How", ("", ""), run + options + versions + seals),
    ]


def comparison_table(outputs: Sequence[Output]) -> Table:
    """A row an output."""
    rows = []
    for output in sorted(outputs, key=lambda output: output.manifest.totals.alpha):
        totals = output.manifest.totals
        rows.append(
            (
                output.name,
                show_alpha(totals.alpha),
                number(totals.realised_alpha),
                number(totals.relative_error),
                share(totals.absorbed_elements / totals.nonzero_elements if totals.nonzero_elements else None),
                share(totals.changed_elements / max(1, totals.parameters)),
                str(totals.ulps_max),
            )
        )
    header = ("output", "alpha", "realised", "relative error", "lost in rounding", "changed", "largest change (ulps)")
    return Table("The outputs", header, rows)


def number(value: float | None) -> str:
    """Four digits; a dash where there is nothing."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def share(value: float | None) -> str:
    """A percentage; a dash where there is nothing."""
    return "–" if value is None else f"{value:.2%}"
