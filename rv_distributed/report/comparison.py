"""The figures of a sweep: each a value of every output over its alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import plotly.graph_objects as go

from rv_distributed.report.drawing import COLOURS, Figure, frame, label, line
from rv_distributed.report.groups import finite
from rv_distributed.report.reading import Output, names_of
from rv_distributed.report.sums import absorbed, changed, v_t_ratio


class _Value(NamedTuple):
    name: str
    title: str
    caption: str
    of: Callable[[Output], float | None]
    form: str = ""


_VALUES: Final = (
    _Value(
        "realised",
        "Realised alpha",
        "On the dashed line it is what was asked for.",
        lambda output: output.manifest.totals.realised_alpha,
    ),
    _Value(
        "absorbed",
        "Lost in rounding",
        "The share of the vector's elements that left the output as the target was.",
        absorbed,
        ".3~%",
    ),
    _Value(
        "error",
        "Relative error ‖(o − t) − αv‖ / ‖αv‖",
        "How far the change is from the one that was asked for: 0 is exact, 1 is as far as no change at all.",
        lambda output: output.manifest.totals.relative_error,
    ),
    _Value(
        "changed", "Elements changed", "The share of all parameters that differ from the target's.", changed, ".3~%"
    ),
    _Value(
        "ratio",
        "‖v‖ / ‖t‖",
        "Before alpha: outputs of one vector and one target lie on a level line, and others have another vector.",
        v_t_ratio,
    ),
)


def comparison_of(outputs: Sequence[Output]) -> Iterator[Figure]:
    """A line for each way of rounding, so that outputs rounded in different ways are not joined."""
    named = sorted(zip(names_of(outputs), outputs, strict=True), key=lambda one: one[1].manifest.totals.alpha)
    ways: dict[str, list[tuple[str, Output]]] = {}
    for name, output in named:
        options = output.manifest.options
        ways.setdefault(f"{options['rounding']}, {options['dtype']}", []).append((name, output))
    for value in _VALUES:
        found = [finite(value.of(output)) for output in outputs]
        if not any(one is not None for one in found):
            yield Figure(value.name, value.title, "", None, _why_not(outputs))
        else:
            yield Figure(value.name, value.title, value.caption, _drawn(value, ways))


def _drawn(value: _Value, ways: dict[str, list[tuple[str, Output]]]) -> go.Figure:
    traces = []
    for number, (way, own) in enumerate(ways.items()):
        alphas = [output.manifest.totals.alpha for _, output in own]
        names = [f"{label(name)}<br>alpha {alpha}" for (name, _), alpha in zip(own, alphas, strict=True)]
        traces.append(line(alphas, [finite(value.of(output)) for _, output in own], names, number, label(way)))
    if value.name == "realised":
        every = [output.manifest.totals.alpha for own in ways.values() for _, output in own]
        ends, dashed = [min(every), max(every)], {"dash": "dash", "color": COLOURS[5]}
        traces.append(go.Scatter(x=ends, y=ends, mode="lines", line=dashed, hoverinfo="skip", name="as asked for"))
    figure = frame(traces, x="alpha asked for", legend=len(ways) > 1)
    return figure.update_yaxes(tickformat=value.form, rangemode="tozero")


def _why_not(outputs: Sequence[Output]) -> str:
    stats = {output.manifest.options["stats"] for output in outputs}
    if not any(output.manifest.has_target for output in outputs):
        return "Vectors have no target to be compared with."
    return "Nothing finite was measured." if "full" in stats else "Not measured: it takes --stats full."
