"""A report on an output, the comparison of several, and an evaluation: one HTML file, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rv_distributed.errors import UsageError
from rv_distributed.report.reading import check_comparable, read_output

__all__ = ["Format", "report"]

Format = Literal["html", "md"]


def report(outs: Sequence[str], form: Format = "html", *, evaluation: str | None = None) -> str:
    """The document, from the manifests and tables of outputs alone, and from the results of an evaluation.

    Raises InputError where there is no output of ours, where one's manifest or tables are not what was written, where
    they cannot be compared, and where there is no evaluation; UsageError when an output is given twice, or nothing is.
    """
    if not outs and evaluation is None:
        raise UsageError("nothing to report on: give the folder of an output, or --eval with that of an evaluation")
    outputs = [read_output(out) for out in outs]
    if outputs:
        check_comparable(outputs)
    from rv_distributed.report.evaluation import read_results

    evaluated = read_results(evaluation) if evaluation is not None else None
    if form == "md":
        from rv_distributed.report.markdown import markdown_of

        return markdown_of(outputs, evaluated)
    from rv_distributed.report.page import page_of

    return page_of(outputs, evaluated)
