"""What all figures of a report share."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import plotly.graph_objects as go

from rv_distributed.errors import one_line

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


def frame(traces: Sequence[Any], *, x: str = "", y: str = "", height: int = 320, legend: bool = False) -> go.Figure:
    """A figure without colours of its own for text and ground: the page gives it those of its mode."""
    figure = go.Figure(data=list(traces))
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 10, "r": 10, "t": 10, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=legend,
        # Above the figure, where it cannot cover the axis however many lines it takes on a phone.
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        dragmode=False,
        # Of any length: plotly would cut the names of workers.
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(title_text=x, automargin=True, fixedrange=True)
    figure.update_yaxes(title_text=y, automargin=True, fixedrange=True)
    return figure


def line(
    x: Sequence[float], y: Sequence[float | None], names: Sequence[str], number: int, name: str = ""
) -> go.Scatter:
    """A line with a dot for every value, whose tooltip has the value as it is in the file."""
    return go.Scatter(
        x=x,
        y=y,
        customdata=[[name, value] for name, value in zip(names, y, strict=True)],
        mode="lines+markers",
        name=name,
        line={"color": COLOURS[number % len(COLOURS)]},
        hovertemplate="%{customdata[0]}<br>%{customdata[1]}<extra></extra>",
    )
