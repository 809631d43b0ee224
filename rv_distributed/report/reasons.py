"""Which figures a report can have, and why it lacks the others: the same for HTML and Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rv_distributed.recipe import show_alpha
from rv_distributed.report.groups import by_layer, finite, group_by, largest_vectors, ulps_of
from rv_distributed.report.reading import Output

#: Of the figures on one output, by their names, in their order.
TITLES: Final = {
    "heat": "‖v‖ / ‖t‖ by layer and module",
    "realised": "Realised alpha by layer",
    "ulps": "Changes in units in the last place",
    "absorbed": "Lost in rounding, by layer",
    "largest": "The longest vectors",
    "speed": "Bytes written a second",
}


def absent(output: Output) -> dict[str, str]:
    """The figures that cannot be drawn, by name, with the reason."""
    ratios = group_by(output.rows, lambda row: row.name).values()
    layers, _ = by_layer(output.rows)
    found = {
        "speed": output.no_pieces,
        "heat": _unless((group.v_t_ratio for group in ratios), why_not(output, needs_target=True)),
        "ulps": "" if ulps_of(output.rows) else why_not(output, needs_target=True, full=True),
        "largest": "" if largest_vectors(output.rows) else why_not(output),
        "realised": _unless((group.realised_alpha for group in layers.values()), why_not(output, full=True)),
        "absorbed": _unless((group.absorbed_fraction for group in layers.values()), why_not(output)),
    }
    if not layers and any(row.v_norm is not None for row in output.rows):
        found |= dict.fromkeys(("realised", "absorbed"), "No tensor's name tells a layer.")
    return {name: found[name] for name in TITLES if found[name]}


def _unless(values: Iterable[float | None], reason: str) -> str:
    return "" if any(finite(value) is not None for value in values) else reason


def why_not(output: Output, *, needs_target: bool = False, full: bool = False) -> str:
    """Why nothing was measured that could be drawn; some needs a target, some full statistics."""
    stats = output.manifest.options["stats"]
    if needs_target and not output.manifest.has_target:
        return "A vector has no target to be compared with."
    if stats == "none":
        return "Not measured: the output was made with --stats none."
    if stats == "basic" and full:
        return "Not measured: it takes --stats full, and the output was made with --stats basic."
    if not output.manifest.totals.combined:
        return "No tensor was computed."
    return f"Nothing finite was measured, with alpha {show_alpha(output.manifest.totals.alpha)}."
