"""What became of an output, for people: its measures in a line, and what of them is odd."""

from __future__ import annotations

from typing import Final

from rv_distributed.checkpoint.manifest import Manifest, Totals
from rv_distributed.recipe import show_alpha
from rv_distributed.units import plural, show_count

#: By how much of alpha what was realised may be off without a warning.
_TOLERANCE: Final = 0.05


def show_measures(manifest: Manifest) -> str:
    """A line on the vector and on what was realised of it."""
    totals = manifest.totals
    if not totals.combined:
        return "no tensor was computed: this is the target"
    texts = _vector(totals) if manifest.options["stats"] != "none" else ["nothing was measured (--stats none)"]
    if manifest.options["stats"] != "none":
        share = totals.changed_elements / max(1, totals.parameters)
        texts.append(f"{share:.1%} of the elements {'changed' if manifest.has_target else 'not zero'}")
    if manifest.has_target and totals.realised_alpha is not None:
        texts.append(f"{_asked(manifest)} realised as {totals.realised_alpha:.4g}")
        if totals.absorbed_elements:
            texts.append(f"{totals.absorbed_elements / totals.nonzero_elements:.1%} of the changes lost in rounding")
    if nonfinite := totals.nan_elements + totals.infinite_elements:
        texts.append(f"{plural(nonfinite, 'element')} NaN or infinite")
    if totals.inexact_elements:
        texts.append(f"{show_count(totals.inexact_elements)} elements not exact in {manifest.options['dtype']}")
    return ", ".join(texts)


def _vector(totals: Totals) -> list[str]:
    texts = [f"‖v‖ {totals.v_norm:.4g}" if totals.v_norm is not None else "‖v‖ not finite"]
    if totals.t_norm and totals.v_norm is not None:
        texts.append(f"‖v‖/‖t‖ {totals.v_norm / totals.t_norm:.3g}")
    if totals.v_max is not None:
        texts.append(f"max |v| {totals.v_max:.3g}")
    return texts


def oddities(out: str, manifest: Manifest) -> list[str]:
    """Warnings of a vector that was zero in all tensors that were computed, and of an alpha that was not realised."""
    totals = manifest.totals
    asked = manifest.operation == "extract" or any(alpha != 0 for alpha in manifest.alphas)
    # With an alpha of 0 in a sweep it is as it should be.
    if not totals.combined or not asked:
        return []
    if totals.v_max == 0:
        again = "Check that donor and reference are the checkpoints that you mean."
        return [f"{out}: the vector was zero in all {plural(totals.combined, 'computed tensor')}. {again}"]
    realised = totals.realised_alpha
    if realised is None or abs(realised - totals.alpha) <= _TOLERANCE * abs(totals.alpha):
        return []
    remedy = (
        "without --requantize there is less rounding" if manifest.options["requantize"] else "--dtype float32 keeps it"
    )
    if manifest.options["rounding"] != "stochastic":
        remedy = f"--rounding stochastic realises it on average; {remedy}"
    return [f"{out}: rounding made of {_asked(manifest)} a realised alpha of {realised:.4g}. {remedy}."]


def _asked(manifest: Manifest) -> str:
    """What was to be realised; of several vectors, the one that is their sum."""
    if len(manifest.alphas) > 1 or manifest.operation == "task_arithmetic":
        return "the vectors' weighted sum, of alpha 1,"
    alpha = manifest.totals.alpha
    return f"a mean alpha of {alpha:.4g}" if None in manifest.alphas else f"alpha {show_alpha(alpha)}"
