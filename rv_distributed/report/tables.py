"""What a report says in words and tables: the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rv_distributed.checkpoint.names import place_of
from rv_distributed.errors import one_line
from rv_distributed.outcome import oddities, show_measures
from rv_distributed.recipe import show_alpha
from rv_distributed.report.groups import (
    ULPS_LABELS,
    Group,
    by_layer,
    finite,
    group_by,
    largest_vectors,
    longest,
    ulps_of,
)
from rv_distributed.report.reading import Output, names_of
from rv_distributed.report.sums import absorbed, changed, ulps_max, v_t_ratio
from rv_distributed.report.throughput import WorkerShare, shares, throughput
from rv_distributed.units import show_bytes, show_count, show_seconds

_MOST_SHOWN = 20
_MOST_LAYERS = 300
_MOST_MODULES = 80
_SPANS = 12


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


def verdict(output: Output, name: str) -> list[str]:
    """The measures in a line, and what is odd about them."""
    return [one_line(text) for text in (show_measures(output.manifest), *oddities(name, output.manifest))]


def tables_of(output: Output) -> Iterator[Table]:
    """All tables of one output; those without rows are left out."""
    found = [_largest(output), _modules(output), _layers(output), _ulps(output), _not_computed(output)]
    found += [_matched(output), _spans(output), _workers(output), *_provenance(output)]
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


def _modules(output: Output) -> Table:
    groups = group_by(output.rows, lambda row: place_of(row.name).module)
    kept = longest(groups, _MOST_MODULES)
    title = fit("By module, over all layers", len(kept), len(groups))
    return Table(title, ("module", *_GROUP_HEADER), [(name, *_measures(groups[name])) for name in kept])


def _layers(output: Output) -> Table:
    layers, elsewhere = by_layer(output.rows)
    shown = list(layers)[:_MOST_LAYERS]
    rows = [(f"{layer.stack} {layer.number}".strip(), *_measures(layers[layer])) for layer in shown]
    rows += [("in none", *_measures(elsewhere))] if elsewhere else []
    return Table(fit("By layer", len(shown), len(layers)), ("layer", *_GROUP_HEADER), rows)


_GROUP_HEADER = ("‖v‖/‖t‖", "realised alpha", "relative error", "changed", "lost in rounding")


def _measures(group: Group) -> tuple[str, ...]:
    exact = (group.v_t_ratio, group.realised_alpha, group.relative_error)
    return (*map(number, exact), share(group.changed_fraction), share(group.absorbed_fraction))


def fit(title: str, shown: int, every: int) -> str:
    """A title that says when not everything is shown."""
    return title if shown >= every else f"{title}: {shown} of {every:,}"


def _ulps(output: Output) -> Table:
    counts = ulps_of(output.rows)
    total = sum(counts)
    rows = [
        (name, f"{count:,}", share(count / max(1, total))) for name, count in zip(ULPS_LABELS, counts, strict=False)
    ]
    return Table("Changes in units in the last place", ("units", "elements", "of the changes"), rows)


def _not_computed(output: Output) -> Table:
    found: dict[tuple[str, str], list[str]] = {}
    for row in output.rows:
        if row.rule != "combine":
            found.setdefault(({"copy": "copied", "cast": "cast", "scale": "scales"}[row.rule], row.why), []).append(
                row.name
            )
    for entry in output.manifest.left_out:
        found.setdefault(("left out", entry.why), []).append(entry.tensor)
    kept = sorted(found, key=lambda key: (key[0] == "left out", -len(found[key])))[:_MOST_SHOWN]
    rows = [(*key, f"{len(found[key]):,}", ", ".join(found[key][:3])) for key in kept]
    title = fit("What was not computed", len(kept), len(found))
    return Table(title, ("", "why", "tensors", "for instance"), rows)


def _matched(output: Output) -> Table:
    rules = output.manifest.rules[:_MOST_SHOWN]
    title = fit("Matched otherwise than by name and shape", len(rules), len(output.manifest.rules))
    return Table(title, ("rule", "what it did"), [(entry.rule, entry.what) for entry in rules])


def _spans(output: Output) -> Table:
    found = throughput(output.pieces, _SPANS)
    rates = [sum(column) for column in zip(*found.rates.values(), strict=True)]
    rows = [(show_seconds(end), f"{show_bytes(rate)}/s") for end, rate in zip(found.ends_s, rates, strict=True)]
    return Table("Bytes written over time", ("until", "speed"), rows)


def _workers(output: Output) -> Table:
    run_s = max(output.manifest.timings.run_s, 1e-9)
    every = sorted(shares(output.pieces), key=lambda one: -one.bytes_written)
    kept = every[:_MOST_SHOWN]
    header = ("worker", "pieces", "written", "speed", "reading", "computing", "writing", "retried")
    return Table(fit("By worker", len(kept), len(every)), header, [_worker(one, run_s) for one in kept])


def _worker(one: WorkerShare, run_s: float) -> tuple[str, ...]:
    waited = tuple(map(show_seconds, (one.read_s, one.compute_s, one.write_s)))
    speed = f"{show_bytes(one.bytes_written / run_s)}/s"
    return (one.worker, f"{one.pieces:,}", show_bytes(one.bytes_written), speed, *waited, f"{one.retried:,}")


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
    for name, output in sorted(zip(names_of(outputs), outputs, strict=True), key=lambda one: _alpha(one[1])):
        totals, options = output.manifest.totals, output.manifest.options
        rows.append(
            (
                *(name, show_alpha(totals.alpha), f"{options['rounding']}, {options['dtype']}"),
                *(number(totals.realised_alpha), number(totals.relative_error)),
                *(share(absorbed(output)), share(changed(output)), number(v_t_ratio(output))),
                str(ulps_max(output) if ulps_max(output) is not None else "–"),
            )
        )
    header = (
        *("output", "alpha", "rounding", "realised", "relative error", "lost in rounding", "changed", "‖v‖/‖t‖"),
        "largest change (ulps)",
    )
    return Table("The outputs", header, rows)


def _alpha(output: Output) -> float:
    return output.manifest.totals.alpha


def number(value: float | None) -> str:
    """Four digits; a dash where there is nothing."""
    return "–" if finite(value) is None else f"{value:.4g}"


def share(value: float | None) -> str:
    """A percentage; a dash where there is nothing."""
    return "–" if finite(value) is None else f"{value:.2%}"
