"""A report as GitHub's Markdown: words and tables, no figures."""

from __future__ import annotations

from collections.abc import Sequence

from rv_distributed.checkpoint.card import as_markdown
from rv_distributed.errors import one_line
from rv_distributed.evaluation.results import Evaluation
from rv_distributed.report.evaluation import evaluation_tables, words_of
from rv_distributed.report.reading import Output, names_of
from rv_distributed.report.reasons import TITLES, absent
from rv_distributed.report.tables import Table, comparison_table, heading, tables_of, verdict


def markdown_of(outputs: Sequence[Output], evaluation: Evaluation | None = None) -> str:
    """The report on one output, or the comparison of several, with an evaluation below it; or on that alone."""
    lines: list[str] = []
    if len(outputs) > 1:
        lines = ["# Comparison", "", *_table(comparison_table(outputs))]
        for name, output in zip(names_of(outputs), outputs, strict=True):
            lines += ["", f"## {_text(name)}", "", _text(heading(output)), "", *map(_item, verdict(output, name))]
    elif outputs:
        (output,) = outputs
        name = output.name
        lines = [f"# {_text(name)}", "", _text(heading(output)), "", *map(_item, verdict(output, name))]
        lines += [_item(f"{TITLES[figure]}: {reason}") for figure, reason in absent(output).items()]
        for table in tables_of(output):
            lines += ["", f"## {_text(table.title)}", "", *_table(table)]
    if evaluation is not None:
        lines += [*([""] if lines else []), "# Evaluation", "", *map(_item, words_of(evaluation))]
        for table in evaluation_tables(evaluation):
            lines += ["", f"## {_text(table.title)}", "", *_table(table)]
    return "\n".join(lines) + "\n"


def _item(text: str) -> str:
    return f"- {_text(text)}"


def _table(table: Table) -> list[str]:
    rows = [table.header, tuple("---" for _ in table.header)]
    shown = [f"| {' | '.join(row)} |" for row in rows]
    return shown + [f"| {' | '.join(map(_text, row))} |" for row in table.rows]


def _text(text: str) -> str:
    return as_markdown(one_line(text))
