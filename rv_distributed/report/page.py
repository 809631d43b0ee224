"""A report as one HTML file that needs nothing else: plotly's script, the figures' data and a little style of its own.

Whatever comes from files is escaped, and the page's own policy keeps it from the network.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Final

from plotly.offline import get_plotlyjs

from rv_distributed.errors import one_line
from rv_distributed.evaluation.results import Evaluation
from rv_distributed.report.comparison import comparison_of
from rv_distributed.report.drawing import Figure
from rv_distributed.report.evaluation import curves_of, evaluation_tables, words_of
from rv_distributed.report.figures import figures_of
from rv_distributed.report.reading import Output, names_of
from rv_distributed.report.tables import Table, comparison_table, heading, tables_of, verdict

_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)

_NUMBER: Final = re.compile(r"–|[-0-9][0-9.,e+×-]*(?: ?[%A-Za-z/]{1,4})?")
_BREAKS: Final = re.compile(r"[./_]+")

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1a1a1a; --faint: #5f5f5f; --ground: #fff; --line: #d8d8d8; --warn: #fff3cd; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #a8a8a8; --ground: #16181c; --line: #3a3d44; --warn: #4d3f12; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--ink); background: var(--ground);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 0; }
p { margin: .25rem 0; } .faint, figcaption { color: var(--faint); font-size: .875rem; }
.warning { background: var(--warn); padding: .5rem .75rem; border-radius: .25rem; }
figure { margin: 0; break-inside: avoid; } .plot { width: 100%; min-height: 8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { text-align: left; padding: .25rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; } td:first-child { overflow-wrap: anywhere; min-width: 6rem; }
.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
tr, h2, figcaption { break-inside: avoid; } h2, figcaption { break-after: avoid; }
@media (max-width: 500px) { td:first-child { min-width: 9rem; } }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; } table { font-size: .75rem; }
  td:not(.number) { overflow-wrap: anywhere; } .warning { border: 1px solid; } }
"""

#: Draws the figures in the colours of the page, anew whenever those change, a phone is turned or the page is printed.
_SCRIPT: Final = """
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
function draw() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  for (const [name, {data, layout}] of Object.entries(figures)) {
    const dressed = structuredClone(layout);
    dressed.font = {color: ink};
    const tickfont = {size: document.getElementById(name).clientWidth < 500 ? 10 : 12};
    for (const axis of [dressed.xaxis, dressed.yaxis])
      Object.assign(axis, {gridcolor: line, zerolinecolor: line, linecolor: line, tickfont});
    Plotly.react(name, data, dressed, {responsive: true, displayModeBar: false});
  }
}
draw();
for (const when of ["(prefers-color-scheme: dark)", "(max-width: 500px)", "print"])
  matchMedia(when).addEventListener("change", draw);
"""


def page_of(outputs: Sequence[Output], evaluation: Evaluation | None = None) -> str:
    """The report on one output, or the comparison of several, with an evaluation below it; or on that alone."""
    figures: list[Figure] = []
    tables: list[Table] = []
    if len(outputs) > 1:
        figures = list(comparison_of(outputs))
        title = f"{len(outputs)} outputs of rv_distributed"
        top = [f"<h1>{_text(title)}</h1>"]
        for name, output in zip(names_of(outputs), outputs, strict=True):
            top += [f"<h2>{_text(name)}</h2>", _heading(output), *_verdict(output, name)]
        # First the numbers that people compare; what each output is stands above.
        top.append(_table(comparison_table(outputs)))
    elif outputs:
        (output,) = outputs
        figures, tables, title = list(figures_of(output)), list(tables_of(output)), output.name
        top = [f"<h1>{_text(title)}</h1>", _heading(output), *_verdict(output, title)]
    else:
        title, top = "Evaluation", ["<h1>Evaluation</h1>"]
    if evaluation is not None:
        # What the vector is good for comes before where it is large.
        figures = [*curves_of(evaluation), *figures]
        tables = [*evaluation_tables(evaluation), *tables]
        top += [f"<p>{_text(words)}</p>" for words in words_of(evaluation)]
    drawn = {figure.name: json.loads(figure.figure.to_json()) for figure in figures if figure.figure is not None}
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
            *top,
            *map(_figure, figures),
            *map(_table, tables),
            '<p class="faint">Made by rv report from the files of the outputs alone.</p>',
            f'<script type="application/json" id="figures">{_embedded(drawn)}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{_SCRIPT}</script></body></html>",
            "",
        ]
    )


def _heading(output: Output) -> str:
    return f'<p class="faint">{_text(heading(output))}</p>'


def _verdict(output: Output, name: str) -> list[str]:
    measures, *odd = verdict(output, name)
    return [f"<p>{_text(measures)}</p>", *(f'<p class="warning">⚠ {_text(text)}</p>' for text in odd)]


def _figure(figure: Figure) -> str:
    title, caption = f"<h2>{_text(figure.title)}</h2>", f"<figcaption>{_text(figure.caption)}</figcaption>"
    if figure.figure is None:
        return f"<section>{title}<p class='faint'>{_text(figure.why_not)}</p></section>"
    told = _text(f"{figure.title}. {figure.caption}")
    plot = f'<div class="plot" id="{figure.name}" role="img" aria-label="{told}"></div>'
    return f"<figure>{title}{caption}{plot}</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in table.header) if any(table.header) else ""
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>" if head else f"<tbody>{rows}</tbody>"
    # What scrolls has to be reached by the keyboard too.
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title)}">'
    return f"<section><h2>{_text(table.title)}</h2>{scroll}<table>{body}</table></div></section>"


def _cell(text: str) -> str:
    """Numbers stay whole, with their units; names may be broken, and best after a dot."""
    shown = _text(text)
    if _NUMBER.fullmatch(text):
        return f'<td class="number">{shown}</td>'
    return f"<td>{_BREAKS.sub(lambda found: found[0] + '<wbr>', shown)}</td>"


def _text(text: str) -> str:
    return html.escape(one_line(text))


def _embedded(document: object) -> str:
    """JSON that no text in it can end the script of."""
    return json.dumps(document, ensure_ascii=True).replace("<", "\\u003c").replace("&", "\\u0026")
