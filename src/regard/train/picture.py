"""The curves of a comparison as one SVG: no plotting library is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#0b6fb8", "#d1600b", "#2b8a3e", "#8e44ad")
WIDTH, HEIGHT, LEFT, TOP, GAP = 400, 240, 56, 52, 64


@dataclass(frozen=True)
class Line:
    """A name for the legend, and points (x, y) in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes. The y axis begins at 0 and ends at `top`, None = a little above what there is."""

    title: str
    x_label: str
    lines: Sequence[Line]
    show: Callable[[float], str]
    top: float | None = None


def svg(title: str, panels: Sequence[Panel]) -> str:
    """The panels beside one another, one legend for all: lines of the same place have the same colour."""
    legend = [52 + 7 * len(line.name) for line in panels[0].lines]
    width = max(len(panels) * (LEFT + WIDTH) + (len(panels) - 1) * (GAP - LEFT) + 24, LEFT + sum(legend))
    height = TOP + HEIGHT + 76
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="600">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        parts += _panel(panel, LEFT + number * (WIDTH + GAP))
    x = float(LEFT)
    for number, line in enumerate(panels[0].lines):
        colour, y = COLOURS[number % len(COLOURS)], height - 14
        parts.append(f'<line x1="{x:.0f}" x2="{x + 18:.0f}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" {STROKE}/>')
        parts.append(f'<text x="{x + 24:.0f}" y="{y}">{escape(line.name)}</text>')
        x += legend[number]
    return "\n".join([*parts, "</svg>", ""])


STROKE = 'stroke-width="2" fill="none" stroke-linejoin="round"'


def _panel(panel: Panel, left: int) -> list[str]:
    found = [point for line in panel.lines for point in line.points if math.isfinite(point[1])]
    x_ticks = _ticks(max((x for x, _ in found), default=1.0))
    y_ticks = _ticks(max((y for _, y in found), default=1.0) if panel.top is None else panel.top)
    bottom = TOP + HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x_ticks[-1] * WIDTH, bottom - min(y, y_ticks[-1]) / y_ticks[-1] * HEIGHT

    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="600">{escape(panel.title)}</text>']
    for tick in y_ticks:
        y = place(0, tick)[1]
        parts.append(f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(panel.show(tick))}</text>')
    for tick in x_ticks:
        x = place(tick, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">{escape(panel.x_label)}</text>')
    for number, line in enumerate(panel.lines):
        places = [place(*point) for point in line.points if math.isfinite(point[1])]
        colour, drawn = COLOURS[number % len(COLOURS)], " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{drawn}" stroke="{colour}" {STROKE}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    return parts


def _ticks(high: float) -> list[float]:
    """0 and round numbers up to `high` or just above it, about five."""
    high = max(high, 1e-9)
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if high / (power * m) <= 5.0001)
    return [round(i * step, 12) for i in range(math.ceil(high / step - 1e-9) + 1)]
