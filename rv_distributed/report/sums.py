"""Values of whole outputs; None where they were not measured, which the manifest's counts of 0 do not tell."""

from __future__ import annotations

from rv_distributed.report.reading import Output
from rv_distributed.results import ratio


def _measured(output: Output) -> bool:
    return output.manifest.options["stats"] != "none" and output.manifest.totals.combined > 0


def absorbed(output: Output) -> float | None:
    """The share of the vector's elements that were lost in rounding."""
    totals = output.manifest.totals
    return ratio(totals.absorbed_elements, totals.nonzero_elements) if _measured(output) else None


def changed(output: Output) -> float | None:
    """The share of all parameters that differ from the target's."""
    totals = output.manifest.totals
    return ratio(totals.changed_elements, totals.parameters) if _measured(output) else None


def v_t_ratio(output: Output) -> float | None:
    """‖v‖/‖t‖ of all that was computed."""
    totals = output.manifest.totals
    return ratio(totals.v_norm, totals.t_norm) if totals.v_norm is not None and totals.t_norm is not None else None


def ulps_max(output: Output) -> int | None:
    """The largest change, in units in the last place."""
    moves = _measured(output) and output.manifest.has_target
    return output.manifest.totals.ulps_max if moves else None
