"""Geometry of the report's figures, in SVG user units; `templates/figures.svg.j2` draws it. No plotting library is
needed, and the page needs no script."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from regard.choose.records import Record
from regard.choose.summary import PlanSummary

WIDTH, HEIGHT = 560, 380
LEFT, RIGHT, TOP, BOTTOM = 50, 150, 14, 46
LABEL_HEIGHT = 15
DODGE = 3
LONGEST_NAME = 20
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """A plan in a scatter plot: its dot, the ends of its interval, and where its label stands."""

    name: str
    colour: int
    x: float
    y: float
    y_low: float
    y_high: float
    label_y: float
    best: bool
    tip: str


@dataclass(frozen=True)
class Scatter:
    """Quality against a cost, with the front of plans that none beats in both."""

    title: str
    x_label: str
    points: tuple[Point, ...]
    front: str
    floor: float | None
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Cell:
    """Accuracy of a plan at one depth and length; None where nothing was measured."""

    share: float | None
    n: int


@dataclass(frozen=True)
class HeatRow:
    """A plan's cells, by length, then by depth."""

    plan: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """Accuracy by depth and length."""

    lengths: tuple[int, ...]
    depths: tuple[str, ...]
    rows: tuple[HeatRow, ...]


def scatter(
    plans: Sequence[PlanSummary],
    colours: dict[str, int],
    cost: Callable[[PlanSummary], float],
    *,
    title: str,
    x_label: str,
    show: Callable[[float], str],
    max_drop: float,
) -> Scatter | None:
    """Quality of each plan against `cost` (smaller is better). None when no plan has a quality."""
    shown = [(p, p.quality, cost(p)) for p in plans if p.quality is not None and math.isfinite(cost(p))]
    if not shown:
        return None
    x_ticks = nice_ticks(0.0, max(x for _, _, x in shown) * 1.04)
    low = min(max(0.0, q.low) for _, q, _ in shown)
    high = max(min(1.6, max(q.high, q.value)) for _, q, _ in shown)
    y_ticks = nice_ticks(min(low, 1 - max_drop - 0.05), max(high, 1.05))

    def x_at(x: float) -> float:
        return LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        y = min(max(y, y_ticks[0]), y_ticks[-1])
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    front = pareto([(x, q.value) for _, q, x in shown])
    xs = dodge([x_at(x) for _, _, x in shown])
    labels = spread([y_at(q.value) for _, q, _ in shown], TOP + 8, HEIGHT - BOTTOM - 4)
    points = tuple(
        Point(
            name=p.plan if len(p.plan) <= LONGEST_NAME else p.plan[: LONGEST_NAME - 1] + "…",
            colour=colours[p.plan],
            x=at,
            y=y_at(q.value),
            y_low=y_at(q.low),
            y_high=y_at(q.high),
            label_y=label,
            best=i in front,
            tip=f"{p.plan}: {q.value:.0%} [{q.low:.0%}, {q.high:.0%}] at {show(x)}",
        )
        for i, ((p, q, x), at, label) in enumerate(zip(shown, xs, labels, strict=True))
    )
    ordered = sorted((points[i] for i in front), key=lambda point: (point.x, -point.y))
    return Scatter(
        title=title,
        x_label=x_label,
        points=points,
        front=_stairs([(point.x, point.y) for point in ordered]),
        floor=y_at(1 - max_drop),
        x_ticks=tuple(Tick(x_at(t), show(t)) for t in x_ticks),
        y_ticks=tuple(Tick(y_at(t), f"{t:.0%}") for t in y_ticks),
    )


def heat_map(records: Sequence[Record], plans: Sequence[str]) -> HeatMap | None:
    """Accuracy by plan, length and quarter of the depth, all tasks with right and wrong answers together."""
    placed = [r for r in records if r.measure == "match" and r.depth is not None]
    if not placed:
        return None
    lengths = tuple(sorted({r.length for r in placed}))
    rows = []
    for plan in plans:
        mine = [r for r in placed if r.plan == plan]
        cells = []
        for length in lengths:
            for low, high in itertools.pairwise(DEPTHS):
                here = [r.score for r in mine if r.length == length and low <= (r.depth or 0.0) < high]
                cells.append(Cell(fmean(here) if here else None, len(here)))
        if mine:
            rows.append(HeatRow(plan, tuple(cells)))
    names = tuple(f"{low:.0%}–{high:.0%}" for low, high in itertools.pairwise(DEPTHS))
    return HeatMap(lengths, names, tuple(rows))


def pareto(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of (cost, gain) that no other point matches in both and beats in one."""
    return {i for i, (x, y) in enumerate(points) if not any(a <= x and b >= y and (a < x or b > y) for a, b in points)}


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def dodge(xs: Sequence[float]) -> list[float]:
    """Dots that would stand on one spot, a few units apart around it, in their order."""
    out = list(xs)
    order = sorted(range(len(xs)), key=lambda i: xs[i])
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and xs[order[end]] - xs[order[start]] < DODGE:
            end += 1
        for place, i in enumerate(sorted(order[start:end])):
            out[i] = xs[i] + (place - (end - start - 1) / 2) * DODGE
        start = end
    return out


def spread(ys: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights of labels, none on another, in the order of the dots and as near to them as a pass each way gets."""
    order = sorted(range(len(ys)), key=lambda i: ys[i])
    out = list(ys)
    last = top - LABEL_HEIGHT
    for i in order:
        out[i] = last = max(out[i], last + LABEL_HEIGHT)
    last = bottom + LABEL_HEIGHT
    for i in reversed(order):
        out[i] = last = min(out[i], last - LABEL_HEIGHT)
    return out


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    """Points of a polyline that goes right, then up."""
    out: list[tuple[float, float]] = []
    for x, y in points:
        if out:
            out.append((x, out[-1][1]))
        out.append((x, y))
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in out)
