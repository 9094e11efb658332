"""The table and the advice, as a terminal shows them; and how numbers are written wherever people read them."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from regard.choose.results import Results
from regard.choose.stats import Interval
from regard.choose.summary import PlanSummary, TaskScore

MODE_TITLES = {"aware": "Question-aware", "agnostic": "Question-agnostic"}
MODE_MEANING = {
    "aware": "sealed after the question: the cache is compressed knowing what is asked",
    "agnostic": "sealed before the question: the cache is compressed once, for questions yet unknown",
}


def show(results: Results, console: Console) -> None:
    """Print a table and the advice for each mode."""
    for mode in results.settings.modes:
        rows = results.summary.of(mode)
        if not rows:
            continue
        console.print()
        console.print(Text(MODE_TITLES[mode], style="bold"), Text(f"({MODE_MEANING[mode]})", style="dim"))
        console.print(_accuracy(rows))
        console.print(_costs(rows))
        for advice in results.advice:
            if advice.mode == mode:
                style = "green" if advice.plan else "yellow"
                title = "Recommended" if advice.plan else "No winner yet"
                console.print(Panel(Text(advice.reason), title=title, title_align="left", border_style=style))
    notes = [*results.notices, *(f"left out of the comparison: {line}" for line in results.summary.left_out)]
    if notes:
        console.print(Group(*(Text(f"note: {line}", style="dim") for line in notes)))


def _accuracy(rows: list[PlanSummary]) -> Table:
    table = _empty(rows)
    tasks = list(dict.fromkeys(score.task for row in rows for score in row.tasks))
    for task in tasks:
        table.add_column(Text(task), justify="right")
    table.add_column("of full’s accuracy", justify="right")
    for row in rows:
        scores = {score.task: score for score in row.tasks}
        cells = [score_text(scores[task]) if task in scores else "–" for task in tasks]
        table.add_row(Text(row.plan), *cells, "–" if row.quality is None else share_text(row.quality))
    return table


def _costs(rows: list[PlanSummary]) -> Table:
    table = _empty(rows)
    for name in ("KV held after prompt", "KV read per token", "first token", "tokens/s", "peak memory"):
        table.add_column(name, justify="right")
    for row in rows:
        memory = "" if row.memory is None else f" ({row.memory:.0%})"
        table.add_row(
            Text(row.plan),
            bytes_text(row.prompt_bytes) + memory,
            bytes_text(row.read_bytes),
            seconds_text(row.first_token_s),
            speed_text(row),
            bytes_text(row.peak_bytes),
        )
    return table


def _empty(rows: list[PlanSummary]) -> Table:
    longest = max(len(row.plan) for row in rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("plan", style="bold", overflow="fold", no_wrap=longest <= 20, max_width=34)
    return table


def score_text(score: TaskScore) -> str:
    """`88% [53, 98]`, or a perplexity with its interval."""
    return f"{score_value(score)} {score_interval(score)}"


def score_value(score: TaskScore) -> str:
    """A share in percent, or a perplexity."""
    return f"{score.interval.value:.0%}" if score.measure == "match" else f"{score.interval.value:.1f}"


def score_interval(score: TaskScore) -> str:
    """The interval of `score_value`, without its unit."""
    i = score.interval
    if score.measure == "match":
        return f"[{100 * i.low:.0f}, {100 * i.high:.0f}]"
    return f"[{i.low:.1f}, {number_text(i.high)}]"


def share_text(interval: Interval) -> str:
    """`96% [91, 99]`."""
    return f"{interval.value:.0%} {share_interval(interval)}"


def share_interval(interval: Interval) -> str:
    """`[91, 99]`, in percent; nothing for the plan that the others are compared with."""
    if interval.low == interval.high:
        return ""
    return f"[{100 * interval.low:.0f}, {number_text(100 * interval.high, 0)}]"


def number_text(value: float, digits: int = 1) -> str:
    """A number, or ∞."""
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def bytes_text(count: float) -> str:
    """`45.0 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def seconds_text(seconds: float | None) -> str:
    """`2.31 s` or `84 ms`; a dash where none was measured."""
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def speed_text(row: PlanSummary) -> str:
    """Tokens a second; a dash where no step was timed."""
    return "–" if math.isnan(row.step_s) else f"{row.tokens_per_s:.1f}"
