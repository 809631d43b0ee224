"""From the results of pieces to the rows of the tables and the manifest's totals: pure functions."""

from __future__ import annotations

import math
from base64 import b64decode
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from blake3 import blake3

from rv_distributed.checkpoint.manifest import Totals
from rv_distributed.checkpoint.pieces import PieceRow
from rv_distributed.checkpoint.table import NO_BYTES, PartDigest, TensorRow, digest_of
from rv_distributed.errors import RunError
from rv_distributed.measures import Leaf, Measures, add_up
from rv_distributed.plan import Plan, TensorPlan
from rv_distributed.runtime.model import BLOCK_BYTES, PieceResult, SpanResult

Spans = Sequence[SpanResult]


def scale_bytes(plan: Plan, pieces: Mapping[int, Spans]) -> dict[int, bytes]:
    """The scales of every requantized tensor, by their index into ``Plan.tensors``, from the spans of all pieces.

    Raises RunError when they are not as many as they should be.
    """
    found: dict[int, bytearray] = {}
    for piece in plan.pieces:
        for span in pieces[piece.number]:
            how = plan.tensors[span.tensor].requantized
            if how is not None:
                found.setdefault(how.scales, bytearray()).extend(b64decode(span.scales))
    for number, raw in found.items():
        tensor = plan.tensors[number]
        if len(raw) != tensor.stop - tensor.start:
            what = f"the pieces have {len(raw)} bytes of it, not {tensor.stop - tensor.start}"
            raise RunError(f"{tensor.name}: {what}; run again with --restart")
    return {number: bytes(raw) for number, raw in found.items()}


def tensor_rows(
    plan: Plan, output: int, pieces: Mapping[int, Spans], scales: Mapping[int, bytes]
) -> tuple[list[TensorRow], Totals]:
    """A row for every tensor of the plan, in its order, and what they add up to, from the spans of all pieces and their
    `scale_bytes`."""
    parts: list[list[PartDigest]] = [[] for _ in plan.tensors]
    leaves: list[list[Leaf]] = [[] for _ in plan.tensors]
    for piece in plan.pieces:
        for span in pieces[piece.number]:
            tensor = plan.tensors[span.tensor]
            start, stop = max(tensor.start, piece.start), min(tensor.stop, piece.stop)
            parts[span.tensor].append(PartDigest(start, stop, span.digest))
            leaves[span.tensor].append((piece.start // BLOCK_BYTES, span.measures))
    for number, raw in scales.items():
        tensor = plan.tensors[number]
        parts[number].append(PartDigest(tensor.start, tensor.stop, blake3(raw).hexdigest()))
    measures = list(map(add_up, leaves))
    rows = [_row(plan, output, *of) for of in zip(plan.tensors, map(tuple, parts), measures, strict=True)]
    return rows, _totals(plan, output, rows, measures)


def _alpha(plan: Plan, output: int, tensor: TensorPlan) -> float:
    """Of what was measured as v."""
    if plan.weighted or not plan.has_target:
        return 1.0
    return next(segment.weights[output].alphas[0] for segment in tensor.segments if segment.vectors)


def _row(plan: Plan, output: int, tensor: TensorPlan, parts: tuple[PartDigest, ...], measures: Measures) -> TensorRow:
    elements = max(1, math.prod(tensor.shape))
    rule, why = tensor.rule_in(output)
    alpha = _alpha(plan, output, tensor) if rule == "combine" else 0.0
    measured = rule == "combine" and plan.stats != "none"
    full, moves = measured and plan.stats == "full", measured and plan.has_target
    v_norm, t_norm = math.sqrt(measures.v_sq), math.sqrt(measures.t_sq)
    has_steps = tensor.requantized is None
    return TensorRow(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        shard=plan.shards[tensor.shard].name,
        start=tensor.start,
        stop=tensor.stop,
        bytes=tensor.stop - tensor.start,
        digest=digest_of([part.digest for part in parts] or [NO_BYTES]),
        parts=parts,
        rule=rule,
        why=why,
        matched=tensor.matched,
        decoded=tensor.decoded,
        input_dtypes=tensor.input_dtypes,
        v_norm=v_norm if measured else None,
        t_norm=t_norm if moves else None,
        v_t_ratio=ratio(v_norm, t_norm) if moves else None,
        cosine=ratio(measures.v_t, v_norm * t_norm) if full and moves else None,
        v_max=measures.v_max if measured else None,
        nonzero=measures.nonzero if measured else None,
        nonzero_fraction=measures.nonzero / elements if measured else None,
        alpha=alpha if measured else None,
        realised_alpha=ratio(measures.moved_v, measures.v_sq) if full else None,
        relative_error=ratio(math.sqrt(measures.error_sq), abs(alpha) * v_norm) if full else None,
        changed=measures.changed if measured else None,
        changed_fraction=measures.changed / elements if measured else None,
        absorbed=measures.absorbed if measured else None,
        absorbed_fraction=ratio(measures.absorbed, measures.nonzero) if measured and alpha else None,
        ulps_max=measures.ulps_max if moves and has_steps else None,
        ulps=measures.ulps if full and moves and has_steps else None,
        inexact=measures.inexact if measured else None,
        overflowed=measures.overflowed,
        nan=measures.nan,
        infinite=measures.infinite,
        first_nonfinite=measures.first_nonfinite,
    )


def _totals(plan: Plan, output: int, rows: Sequence[TensorRow], measures: Sequence[Measures]) -> Totals:
    rules = Counter(row.rule for row in rows)
    total, wanted_v, wanted_sq = Measures(), 0.0, 0.0
    alphas = set()
    for tensor, row, found in zip(plan.tensors, rows, measures, strict=True):
        if row.rule == "combine":
            total = total.plus(found)
            alpha = _alpha(plan, output, tensor)
            alphas.add(alpha)
            wanted_v += alpha * found.v_sq
            wanted_sq += alpha * alpha * found.v_sq
    asked = _asked(alphas, wanted_v, total.v_sq)
    v_norm, t_norm = math.sqrt(total.v_sq), math.sqrt(total.t_sq)
    full = plan.stats == "full"
    return Totals(
        tensors=len(rows),
        combined=rules["combine"],
        cast=rules["cast"],
        copied=rules["copy"],
        parameters=sum(math.prod(row.shape) for row in rows),
        data_bytes=plan.data_bytes,
        v_norm=_finite(v_norm) if plan.stats != "none" else None,
        t_norm=_finite(t_norm) if plan.has_target and plan.stats != "none" else None,
        v_max=_finite(total.v_max) if plan.stats != "none" else None,
        cosine=_finite(ratio(total.v_t, v_norm * t_norm)) if full else None,
        alpha=asked,
        realised_alpha=_finite(ratio(total.moved_v, total.v_sq)) if full else None,
        relative_error=_finite(ratio(math.sqrt(total.error_sq), math.sqrt(wanted_sq))) if full else None,
        nonzero_elements=total.nonzero,
        changed_elements=total.changed,
        absorbed_elements=total.absorbed,
        ulps_max=total.ulps_max if plan.has_target else 0,
        inexact_elements=total.inexact,
        overflowed_elements=sum(found.overflowed for found in measures),
        nan_elements=sum(found.nan for found in measures),
        infinite_elements=sum(found.infinite for found in measures),
    )


def _asked(alphas: set[float], wanted_v: float, v_sq: float) -> float:
    """The alpha of all tensors; where they have several, what a realised alpha would be without rounding."""
    if len(alphas) <= 1:
        return next(iter(alphas), 0.0)
    return _finite(ratio(wanted_v, v_sq)) or 0.0


def piece_rows(plan: Plan, results: Iterable[tuple[PieceResult, float]]) -> list[PieceRow]:
    """A row for every piece of the plan; ``results`` are those of this run, with their seconds from its start."""
    made = {result.piece: (result, seconds) for result, seconds in results}
    rows = []
    for piece in plan.pieces:
        row = PieceRow(piece.number, plan.shards[piece.shard].name, piece.start, piece.stop)
        if piece.number in made:
            result, seconds = made[piece.number]
            bytes_moved = result.bytes_read, result.bytes_written
            row = PieceRow(*row[:4], result.worker, result.attempt, seconds, *result.waited, *bytes_moved)
        rows.append(row)
    return rows


def ratio(part: float, whole: float) -> float | None:
    """``part / whole``; None when that is 0."""
    return part / whole if whole else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
