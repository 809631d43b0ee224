"""Sums over a strip, in float64. Only here may operations be fused and reordered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from numba import njit

from rv_distributed.kernels.jit.common import BF16, DOUBLE, F16, F32, FLOAT, PLAIN, U16, Array, Convert
from rv_distributed.kernels.jit.convert import from_bf16, from_f16, same
from rv_distributed.kernels.strips import ERROR_SQ, MOVED_V, T_SQ, V_SQ, V_T

_SUMS: Final[dict[str, Any]] = {**PLAIN, "fastmath": {"reassoc", "contract", "nsz"}}


def _adding_sums(convert: Convert) -> Callable[..., None]:
    @njit(**_SUMS)
    def loop(t: Array, v: Array, out: Array, alpha: float, sums: Array) -> None:
        v_sq = t_sq = v_t = moved_v = error_sq = 0.0
        for i in range(v.size):
            x, y = DOUBLE(v[i]), DOUBLE(t[i])
            moved = DOUBLE(convert(out[i])) - y
            error = moved - alpha * x
            v_sq += x * x
            t_sq += y * y
            v_t += x * y
            moved_v += moved * x
            error_sq += error * error
        sums[V_SQ] += v_sq
        sums[T_SQ] += t_sq
        sums[V_T] += v_t
        sums[MOVED_V] += moved_v
        sums[ERROR_SQ] += error_sq

    return loop  # type: ignore[no-any-return]


_add_sums_bf16, _add_sums_f16, add_sums_of_values = map(_adding_sums, (from_bf16, from_f16, same))


@njit(**PLAIN)
def add_sums(t: Array, v: Array, out: Array, code: int, alpha: float, sums: Array) -> None:
    """All sums, in float64, in which every product of two float32 is exact."""
    if code == BF16:
        _add_sums_bf16(t, v, out.view(U16), alpha, sums)
    elif code == F16:
        _add_sums_f16(t, v, out.view(U16), alpha, sums)
    elif code == F32:
        add_sums_of_values(t, v, out.view(FLOAT), alpha, sums)
    else:
        add_sums_of_values(t, v, out.view(DOUBLE), alpha, sums)


@njit(**_SUMS)
def add_squares(t: Array, v: Array, sums: Array) -> None:
    v_sq = t_sq = 0.0
    for i in range(v.size):
        v_sq += DOUBLE(v[i]) * DOUBLE(v[i])
        t_sq += DOUBLE(t[i]) * DOUBLE(t[i])
    sums[V_SQ] += v_sq
    sums[T_SQ] += t_sq
