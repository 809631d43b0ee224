"""A figure of lines with error bars, as SVG, which a README shows and which needs nothing to draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 380, 52, 16, 120, 44
#: Okabe and Ito's colours, which people who are colour-blind tell apart.
_COLOURS: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


class Series(NamedTuple):
    """A line."""

    name: str
    points: Sequence[tuple[float, float, float]]
    """x, y from 0 to 1, and the half of the error bar."""


def figure(series: Sequence[Series], *, x: str, y: str) -> str:
    """All series in one figure, with y from 0 to 1."""
    places = [point[0] for one in series for point in one.points]
    low, high = min(places), max(places)

    def at(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        return _HEIGHT - _BOTTOM - value * (_HEIGHT - _TOP - _BOTTOM)

    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path d="M{_LEFT} {up(tick):.1f}H{_WIDTH - _RIGHT}" stroke="#d8d8d8"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    foot = _HEIGHT - _BOTTOM + 18
    parts += [f'<text x="{at(p):.1f}" y="{foot}" text-anchor="middle">{p:g}</text>' for p in sorted(set(places))]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{x}</text>')
    parts.append(f'<text transform="translate(14 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">{y}</text>')
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        path = "L".join(f"{at(px):.1f} {up(py):.1f}" for px, py, _ in one.points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += _bars([(at(px), up(py - error), up(py + error), up(py)) for px, py, error in one.points], colour)
        top = _TOP + 18 * number + 10
        parts.append(f'<path d="M{_WIDTH - _RIGHT + 12} {top}h18" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 36}" y="{top + 4}">{one.name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _bars(places: Sequence[tuple[float, float, float, float]], colour: str) -> Iterator[str]:
    for across, low, high, middle in places:
        ends = f"M{across - 3:.1f} {low:.1f}h6M{across - 3:.1f} {high:.1f}h6"
        yield f'<path d="M{across:.1f} {low:.1f}V{high:.1f}{ends}" stroke="{colour}"/>'
        yield f'<circle cx="{across:.1f}" cy="{middle:.1f}" r="3" fill="{colour}"/>'
