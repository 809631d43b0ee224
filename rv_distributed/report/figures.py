"""The figures on one output, by plotly. Each has a name, a title, a caption and its data; none knows of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import plotly.graph_objects as go

from rv_distributed.checkpoint.names import place_of, short_name, shortened
from rv_distributed.report.drawing import COLOURS, Figure, frame, label, line
from rv_distributed.report.groups import (
    ULPS_LABELS,
    Group,
    by_layer,
    group_by,
    largest_vectors,
    longest,
    ulps_of,
)
from rv_distributed.report.reading import Output
from rv_distributed.report.reasons import TITLES, absent
from rv_distributed.report.throughput import throughput

#: More than any model has that people train, so that names that are no model's cannot make a page of any size.
MOST_MODULES: Final = 80
MOST_LAYERS: Final = 300


def figures_of(output: Output) -> Iterator[Figure]:
    """All figures of one output."""
    reasons = absent(output)
    for name, title in TITLES.items():
        if name in reasons:
            yield Figure(name, title, "", None, reasons[name])
        else:
            caption, figure = _DRAWN[name](output)
            yield Figure(name, title, caption, figure)


def _heat_map(output: Output) -> tuple[str, go.Figure]:
    places = {row.name: place_of(row.name) for row in output.rows}
    every = group_by(output.rows, lambda row: places[row.name].module)
    modules = longest(every, MOST_MODULES)
    shown = set(modules)
    groups = group_by(
        (row for row in output.rows if places[row.name].module in shown),
        lambda row: (places[row.name].layer, places[row.name].module),
    )
    layers = sorted({layer for layer, _ in groups if layer is not None})
    columns: list[int | None] = [None] * any(layer is None for layer, _ in groups) + list(layers[:MOST_LAYERS])
    values = [
        [group.v_t_ratio if (group := groups.get((column, module))) else None for column in columns]
        for module in modules
    ]
    names = [label(module) for module in modules]
    heat = go.Heatmap(
        x=["–" if column is None else str(column) for column in columns],
        y=names,
        z=values,
        # The number as it is, for the tooltip; plotly's own are rounded.
        customdata=[[[name, value] for value in row] for name, row in zip(names, values, strict=True)],
        colorscale="Cividis",
        hovertemplate="%{customdata[0]}<br>layer %{x}<br>‖v‖/‖t‖ %{customdata[1]}<extra></extra>",
        hoverongaps=False,
        xgap=0.5,
        ygap=0.5,
        colorbar={
            "thickness": 10,
            "tickformat": ".2g",
            "nticks": 5,
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "len": 0.9,
        },
    )
    figure = frame([heat], x="layer (–: in none)", height=190 + 22 * len(modules))
    figure.update_xaxes(type="category", showgrid=False)
    short = [label(shortened(module)) for module in modules]
    figure.update_yaxes(type="category", autorange="reversed", tickvals=names, ticktext=short, showgrid=False)
    caption = "Where the vector is large beside the weights it is added to. Brighter is larger; empty is not computed."
    caption += _of_all(len(modules), len(every), "modules, with the longest vectors,")
    return caption + _of_all(len(layers[:MOST_LAYERS]), len(layers), "layers"), figure


def _lines(output: Output, value: Callable[[Group], float | None], what: str, form: str) -> tuple[str, go.Figure]:
    """A line for each stack of layers, and what to say of the layers that are left out."""
    groups, _ = by_layer(output.rows)
    shown = list(groups)[:MOST_LAYERS]
    stacks = list(dict.fromkeys(layer.stack for layer in shown))
    traces = []
    for number, stack in enumerate(stacks):
        own = [layer for layer in shown if layer.stack == stack]
        names = [f"{label(stack)} layer {layer.number}: {what}".strip() for layer in own]
        numbers, values = [layer.number for layer in own], [value(groups[layer]) for layer in own]
        traces.append(line(numbers, values, names, number, label(shortened(stack)) or "language model"))
    figure = frame(traces, x="layer", legend=1 < len(stacks) <= 8)
    figure.update_yaxes(tickformat=form)
    return _of_all(len(shown), len(groups), "layers"), figure


def _realised(output: Output) -> tuple[str, go.Figure]:
    more, figure = _lines(output, lambda group: group.realised_alpha, "realised alpha", "")
    figure.add_hline(y=output.manifest.totals.alpha, line_dash="dash", line_color=COLOURS[5])
    caption = "The dashed line is the alpha asked for; a layer below it got less of the vector, one above it more."
    return caption + more, figure


def _absorbed(output: Output) -> tuple[str, go.Figure]:
    more, figure = _lines(output, lambda group: group.absorbed_fraction, "lost in rounding", ".3~%")
    figure.update_yaxes(rangemode="tozero")
    caption = "The share of the vector's elements that left the output as the target was. These changes are gone."
    return caption + more, figure


def _ulps(output: Output) -> tuple[str, go.Figure]:
    bars = go.Bar(
        x=list(ULPS_LABELS),
        y=ulps_of(output.rows),
        marker_color=COLOURS[0],
        hovertemplate="%{x} units<br>%{y:,} elements<extra></extra>",
    )
    figure = frame([bars], x="units in the last place", y="elements")
    figure.update_xaxes(type="category")
    caption = (
        "One unit is the step to the next number the dtype holds. Where most are 1, rounding decides what is kept."
    )
    return caption, figure


def _largest(output: Output) -> tuple[str, go.Figure]:
    rows = largest_vectors(output.rows)
    names = [label(row.name) for row in rows]
    bars = go.Bar(
        x=[row.v_norm for row in rows],
        y=names,
        customdata=[[name, row.v_norm] for name, row in zip(names, rows, strict=True)],
        orientation="h",
        marker_color=COLOURS[0],
        hovertemplate="%{customdata[0]}<br>‖v‖ %{customdata[1]}<extra></extra>",
    )
    figure = frame([bars], x="‖v‖", height=120 + 20 * len(rows))
    short = [label(short_name(row.name)) for row in rows]
    figure.update_yaxes(type="category", autorange="reversed", tickvals=names, ticktext=short)
    figure.update_xaxes(nticks=6)
    return "The tensors that carry most of the vector, by ‖v‖. One far ahead of the others deserves a look.", figure


def _speed(output: Output) -> tuple[str, go.Figure]:
    found = throughput(output.pieces)
    width = found.ends_s[0]
    bars = [
        go.Bar(
            x=found.ends_s,
            y=rates,
            # Each lies over its own span, which ends at x.
            width=width,
            offset=-width,
            name=label(shortened(worker, 60)),
            marker_color=COLOURS[number % len(COLOURS)],
            hovertemplate="until %{x:.6g} s<br>%{y:,.0f} B/s",
        )
        for number, (worker, rates) in enumerate(found.rates.items())
    ]
    figure = frame(bars, x="seconds from the start of the run", y="B/s", legend=1 < len(bars) <= 16)
    figure.update_layout(barmode="stack")
    figure.update_xaxes(range=[0, found.ends_s[-1]])
    figure.update_yaxes(tickformat=".2s", rangemode="tozero")
    caption = "Pieces count when they are finished. Where it falls, the storage or a worker was slow."
    return caption, figure


def _of_all(shown: int, every: int, what: str) -> str:
    return f" Only {shown} of {every:,} {what} are shown." if shown < every else ""


_DRAWN: Final[dict[str, Callable[[Output], tuple[str, Any]]]] = {
    "heat": _heat_map,
    "realised": _realised,
    "ulps": _ulps,
    "absorbed": _absorbed,
    "largest": _largest,
    "speed": _speed,
}
