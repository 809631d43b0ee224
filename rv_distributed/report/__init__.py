"""A report on an output, or the comparison of several: one HTML file, or Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rv_distributed.report.reading import check_comparable, read_output

__all__ = ["Format", "report"]

Format = Literal["html", "md"]


def report(outs: Sequence[str], form: Format = "html") -> str:
    """The document, from the manifests and tables of outputs alone.

    Raises InputError where there is no output of ours, where one's manifest or tables are not what was written, and
    where they cannot be compared; UsageError when one is given twice.
    """
    outputs = [read_output(out) for out in outs]
    check_comparable(outputs)
    if form == "md":
        from rv_distributed.report.markdown import markdown_of

        return markdown_of(outputs)
    from rv_distributed.report.page import page_of

    return page_of(outputs)
