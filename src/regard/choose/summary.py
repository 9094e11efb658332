"""From records to numbers per plan: what the table, the report and the recommendation read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from regard.choose.records import Record
from regard.choose.stats import (
    Array,
    Interval,
    interval_of,
    likelihood_draws,
    mean_interval,
    ratio_draws,
    wilson,
)

LEAST_ACCURACY = 0.25
"""A task on which `full` itself is right less often says nothing about what a plan loses."""
DRAW_SEED = 20230917


@dataclass(frozen=True)
class TaskScore:
    """One plan on one task: accuracy (Wilson's interval) or perplexity (Student's, on the logarithm)."""

    task: str
    measure: str
    interval: Interval


@dataclass(frozen=True)
class PlanSummary:
    """One plan in one mode.

    quality: mean over tasks (and lengths) of the share of full's accuracy it keeps, for perplexity full's divided by
    its own; paired over prompts; None where `full` was not run on the same prompts. memory: prompt_bytes as a share
    of full's. step_s: median seconds of a decoding step. first_token_s: median over prompts whose prefill was timed
    for this plan.
    """

    plan: str
    mode: str
    tasks: tuple[TaskScore, ...]
    quality: Interval | None
    memory: float | None
    first_token_s: float | None
    step_s: float
    prompt_bytes: float
    read_bytes: float
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed of one row."""
        return 1 / self.step_s


@dataclass(frozen=True)
class Summary:
    """All plans in all modes, and the tasks left out of `quality` with the reason."""

    plans: tuple[PlanSummary, ...]
    left_out: tuple[str, ...]

    def of(self, mode: str) -> list[PlanSummary]:
        """The plans of one mode."""
        return [plan for plan in self.plans if plan.mode == mode]


def summarize(records: Sequence[Record], plans: Sequence[str], baseline: str) -> Summary:
    """Summaries of `plans`, in their order, compared with the plan named `baseline`. Plans without records are
    absent."""
    found: list[PlanSummary] = []
    left_out: list[str] = []
    for mode in sorted({r.mode for r in records}, key=("aware", "agnostic").index):
        here = [r for r in records if r.mode == mode]
        full = [r for r in here if r.plan == baseline]
        weak = _weak(full)
        left_out += [f"{task} ({mode}): {baseline} itself is right on {share:.0%}" for task, share in weak.items()]
        useful = [r for r in full if r.task not in weak]
        full_bytes = fmean(r.prompt_bytes for r in full) if full else None
        for name in plans:
            mine = [r for r in here if r.plan == name]
            if mine:
                found.append(_plan(name, mode, mine, useful, full_bytes, is_baseline=name == baseline))
    return Summary(tuple(found), tuple(left_out))


def _plan(
    name: str, mode: str, mine: list[Record], full: list[Record], full_bytes: float | None, *, is_baseline: bool
) -> PlanSummary:
    firsts = [r.first_token_s for r in mine if r.first_token_s is not None]
    held = fmean(r.prompt_bytes for r in mine)
    quality = quality_of(mine, full)
    if is_baseline and quality is not None:
        quality = Interval(1.0, 1.0, 1.0, quality.n)  # against itself there is no doubt
    return PlanSummary(
        plan=name,
        mode=mode,
        tasks=tuple(_score(task, rows) for task, rows in _by_task(mine).items()),
        quality=quality,
        memory=None if not full_bytes else held / full_bytes,
        first_token_s=median(firsts) if firsts else None,
        step_s=median([s for r in mine for s in r.step_s] or [math.nan]),
        prompt_bytes=held,
        read_bytes=fmean(r.read_bytes for r in mine),
        peak_bytes=max(r.peak_bytes for r in mine),
    )


def quality_of(mine: Iterable[Record], full: Iterable[Record]) -> Interval | None:
    """Share of full's quality that a plan keeps: the mean over (task, length) of the paired ratio, with its interval.

    n counts the prompts of the smallest stratum. None when the two have no prompt in common.
    """
    theirs = {(r.task, r.length, r.index): r for r in full}
    strata: dict[tuple[str, int], list[tuple[Record, Record]]] = defaultdict(list)
    for record in mine:
        other = theirs.get((record.task, record.length, record.index))
        if other is not None:
            strata[record.task, record.length].append((record, other))
    values: list[float] = []
    draws: list[Array] = []
    rng = np.random.default_rng(DRAW_SEED)  # the same for every plan: common random numbers
    for _, pairs in sorted(strata.items()):
        plan, base = [p.score for p, _ in pairs], [f.score for _, f in pairs]
        if pairs[0][0].measure == "match":
            if fmean(base) == 0:
                continue
            values.append(fmean(plan) / fmean(base))
            draws.append(ratio_draws(plan, base, rng))
        else:
            values.append(math.exp(fmean(base) - fmean(plan)))
            draws.append(likelihood_draws(plan, base, rng))
    if not values:
        return None
    together: Array = np.mean(draws, axis=0)
    return interval_of(fmean(values), together, min(map(len, strata.values())))


def accuracy_of(records: Sequence[Record]) -> Interval:
    """Accuracy of right/wrong records, or perplexity of likelihood ones."""
    if records[0].measure == "match":
        return wilson(round(sum(r.score for r in records)), len(records))
    mean = mean_interval([r.score for r in records])
    return Interval(math.exp(mean.value), math.exp(mean.low), _exp(mean.high), mean.n)


def _score(task: str, rows: list[Record]) -> TaskScore:
    return TaskScore(task, rows[0].measure, accuracy_of(rows))


def _weak(full: list[Record]) -> dict[str, float]:
    shares = {t: fmean(r.score for r in rows) for t, rows in _by_task(full).items() if rows[0].measure == "match"}
    return {task: share for task, share in shares.items() if share < LEAST_ACCURACY}


def _by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    tasks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record.task].append(record)
    return dict(tasks)


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)
