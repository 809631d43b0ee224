"""The figures of a report, by plotly. Each has a name, a title, a caption and its data; none knows of the page."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import plotly.graph_objects as go

from rv_distributed.errors import one_line
from rv_distributed.recipe import show_alpha
from rv_distributed.report.groups import ULPS_LABELS, Group, finite, group_by, largest_vectors, place_of, ulps_of
from rv_distributed.report.reading import Output
from rv_distributed.report.throughput import throughput

#: Okabe and Ito's colours, which people who are colour-blind tell apart, and which show on white and on black.
COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


class Figure(NamedTuple):
    """One figure, or the reason why there is none."""

    name: str
    title: str
    caption: str
    """What to look for."""
    figure: go.Figure | None
    why_not: str = ""


def label(text: str) -> str:
    """A name from a file for plotly, which takes some HTML in its texts."""
    return html.escape(one_line(text))


def figures_of(output: Output) -> Iterator[Figure]:
    """All figures of one output."""
    yield _heat_map(output)
    yield _by_layer(
        output,
        "realised",
        "Realised alpha by layer",
        "Rounding makes small vectors smaller or larger. On the dashed line alpha is what was asked for.",
        lambda group: group.realised_alpha,
        asked=True,
    )
    yield _ulps(output)
    yield _by_layer(
        output,
        "absorbed",
        "Lost in rounding, by layer",
        "The share of the vector's elements that left the output as the target was. These changes are gone.",
        lambda group: group.absorbed_fraction,
    )
    yield _largest(output)
    yield _throughput(output)


def _heat_map(output: Output) -> Figure:
    title, caption = "‖v‖ / ‖t‖ by layer and module", "Where the vector is large beside the weights it is added to."
    groups = group_by(output.rows, lambda row: place_of(row.name))
    if not any(group.v_t_ratio is not None for group in groups.values()):
        return Figure("heat", title, caption, None, _why_not(output, needs_target=True))
    layers = sorted({place.layer for place in groups if place.layer is not None})
    columns: list[int | None] = [None] * any(place.layer is None for place in groups) + list(layers)
    modules = list(dict.fromkeys(place.module for place in groups))
    values = [
        [group.v_t_ratio if (group := groups.get((column, module))) else None for column in columns]  # type: ignore[call-overload]
        for module in modules
    ]
    heat = go.Heatmap(
        x=["–" if column is None else str(column) for column in columns],
        y=[label(module) for module in modules],
        z=values,
        colorscale="Cividis",
        hovertemplate="%{y}<br>layer %{x}<br>‖v‖/‖t‖ %{z:.12g}<extra></extra>",
        hoverongaps=False,
        colorbar={"thickness": 10, "tickformat": ".2g", "orientation": "h", "y": 1.0, "yanchor": "bottom", "len": 0.9},
    )
    figure = _figure([heat], x="layer (–: in none)", height=190 + 22 * len(modules))
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    return Figure("heat", title, caption, figure)


def _by_layer(
    output: Output,
    name: str,
    title: str,
    caption: str,
    value: Callable[[Group], float | None],
    *,
    asked: bool = False,
) -> Figure:
    groups = group_by(output.rows, lambda row: place_of(row.name).layer)
    layers = sorted(layer for layer in groups if layer is not None)
    found = [value(groups[layer]) for layer in layers]
    if not any(one is not None for one in found) or (asked and output.manifest.totals.realised_alpha is None):
        return Figure(name, title, caption, None, "No layer has it." if not layers else _why_not(output))
    line = go.Scatter(
        x=layers,
        y=found,
        mode="lines+markers",
        line={"color": COLOURS[0]},
        hovertemplate="layer %{x}<br>%{y:.12g}<extra></extra>",
    )
    figure = _figure([line], x="layer")
    if asked:
        figure.add_hline(y=output.manifest.totals.alpha, line_dash="dash", line_color=COLOURS[5])
    else:
        figure.update_yaxes(tickformat=".3~%", rangemode="tozero")
    return Figure(name, title, caption, figure)


def _ulps(output: Output) -> Figure:
    title = "Changes in units in the last place"
    caption = "Most changes of a trained vector are of one such unit: the next number that the dtype can hold."
    counts = ulps_of(output.rows)
    if not counts:
        return Figure("ulps", title, caption, None, _why_not(output, needs_target=True, full=True))
    bars = go.Bar(
        x=list(ULPS_LABELS),
        y=counts,
        marker_color=COLOURS[0],
        hovertemplate="%{x} units<br>%{y:,} elements<extra></extra>",
    )
    figure = _figure([bars], x="units in the last place", y="elements")
    figure.update_xaxes(type="category")
    return Figure("ulps", title, caption, figure)


def _largest(output: Output) -> Figure:
    title, caption = "The longest vectors", "The tensors that carry most of the vector, by ‖v‖."
    rows = largest_vectors(output.rows)
    if not rows:
        return Figure("largest", title, caption, None, _why_not(output))
    bars = go.Bar(
        x=[row.v_norm for row in rows],
        y=[label(row.name) for row in rows],
        orientation="h",
        marker_color=COLOURS[0],
        hovertemplate="%{y}<br>‖v‖ %{x:.12g}<extra></extra>",
    )
    figure = _figure([bars], x="‖v‖", height=120 + 20 * len(rows))
    figure.update_yaxes(type="category", autorange="reversed")
    return Figure("largest", title, caption, figure)


def _throughput(output: Output) -> Figure:
    title, caption = (
        "Bytes written a second",
        "By worker, over the run. Where it falls, the storage or a worker was slow.",
    )
    found = throughput(output.pieces)
    if not found.ends_s:
        return Figure("speed", title, caption, None, "All pieces were kept from an earlier run.")
    bars = [
        go.Bar(
            x=found.ends_s,
            y=rates,
            name=label(worker),
            marker_color=COLOURS[number % len(COLOURS)],
            hovertemplate="until %{x:.6g} s<br>%{y:,.0f} B/s<extra></extra>",
        )
        for number, (worker, rates) in enumerate(found.rates.items())
    ]
    figure = _figure(bars, x="seconds", y="B/s")
    figure.update_layout(barmode="stack", showlegend=1 < len(bars) <= 16, legend={"orientation": "h", "y": -0.3})
    figure.update_yaxes(tickformat=".2s")
    return Figure("speed", title, caption, figure)


def comparison_of(outputs: Sequence[Output]) -> Iterator[Figure]:
    """The figures of a sweep: each a value of every output over its alpha."""
    found = sorted(outputs, key=lambda output: output.manifest.totals.alpha)
    alphas = [output.manifest.totals.alpha for output in found]
    totals = [output.manifest.totals for output in found]
    values: list[tuple[str, str, str, list[float | None], str]] = [
        (
            "realised",
            "Realised alpha",
            "On the dashed line it is what was asked for.",
            [t.realised_alpha for t in totals],
            "",
        ),
        (
            "absorbed",
            "Lost in rounding",
            "The share of the vector's elements that left the output as the target was.",
            [t.absorbed_elements / t.nonzero_elements if t.nonzero_elements else None for t in totals],
            ".3~%",
        ),
        (
            "error",
            "Relative error ‖(o − t) − αv‖ / ‖αv‖",
            "How far the change is from the one that was asked for.",
            [t.relative_error for t in totals],
            "",
        ),
        (
            "changed",
            "Elements changed",
            "The share of all parameters that differ from the target's.",
            [t.changed_elements / max(1, t.parameters) for t in totals],
            ".3~%",
        ),
    ]
    for name, title, caption, y, form in values:
        if not any(finite(value) is not None for value in y):
            yield Figure(name, title, caption, None, "Not measured: it takes --stats full.")
            continue
        dots = go.Scatter(
            x=alphas,
            y=[finite(value) for value in y],
            mode="lines+markers",
            line={"color": COLOURS[0]},
            text=[label(output.name) for output in found],
            hovertemplate="%{text}<br>alpha %{x:.12g}<br>%{y:.12g}<extra></extra>",
        )
        figure = _figure([dots], x="alpha asked for")
        if name == "realised":
            ends = [min(alphas), max(alphas)]
            dashed = {"dash": "dash", "color": COLOURS[5]}
            figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=dashed, hoverinfo="skip"))
        figure.update_yaxes(tickformat=form)
        yield Figure(name, title, caption, figure)


def _figure(traces: Sequence[Any], *, x: str = "", y: str = "", height: int = 320) -> go.Figure:
    """A figure without colours of its own for text and ground: the page gives it those of its mode."""
    figure = go.Figure(data=list(traces))
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        dragmode=False,
    )
    figure.update_xaxes(title_text=x, automargin=True, fixedrange=True)
    figure.update_yaxes(title_text=y, automargin=True, fixedrange=True)
    return figure


def _why_not(output: Output, *, needs_target: bool = False, full: bool = False) -> str:
    stats = output.manifest.options["stats"]
    if needs_target and output.manifest.operation == "extract":
        return "A vector has no target to be compared with."
    if stats == "none" or (stats == "basic" and full):
        return f"Not measured: the output was made with --stats {stats}."
    if stats == "basic":
        return "Not measured: it takes --stats full."
    return f"Nothing finite was measured: no tensor was computed with alpha {show_alpha(output.manifest.totals.alpha)}."
