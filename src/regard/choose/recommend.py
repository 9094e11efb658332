"""Which plan to take, and why; or that these prompts cannot tell.

A plan is *within* when the whole interval of its quality lies above 1 − max_drop, *out* when all of it lies below, and
*open* otherwise. Only a plan that is within is ever named the winner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from regard.choose.summary import PlanSummary
from regard.errors import UnknownNameError, require

Objective = Literal["memory", "latency", "accuracy"]
OBJECTIVES: tuple[Objective, ...] = ("memory", "latency", "accuracy")
Verdict = Literal["within", "open", "out"]

MOST_SAMPLES = 2000
ALIKE = 0.05
"""Memory or speed that differs by less counts as equal; quality then decides."""


@dataclass(frozen=True)
class Recommendation:
    """For one mode: the plan to take (None = these prompts cannot tell), the reason, and each plan's verdict.

    samples: prompts per task with which the plan in doubt would probably be decided; None where none is.
    """

    mode: str
    plan: str | None
    reason: str
    verdicts: dict[str, Verdict]
    samples: int | None


def recommend(
    plans: Sequence[PlanSummary], baseline: str, *, max_drop: float = 0.05, objective: Objective = "memory"
) -> Recommendation:
    """From the summaries of one mode. max_drop: share of full's quality that may be lost, 0 ≤ max_drop < 1."""
    check(max_drop, objective)
    mode = plans[0].mode
    full = next((p for p in plans if p.plan == baseline), None)
    rivals = [p for p in plans if p.plan != baseline and p.quality is not None]
    if full is None or full.quality is None or not rivals:
        why = f"no prompt on which both {baseline} and another plan were measured, on a task that {baseline} can do"
        return Recommendation(mode, None, f"no recommendation: {why}", {}, None)
    floor = 1 - max_drop
    verdicts = {p.plan: _verdict(p, floor) for p in rivals}
    within = [p for p in rivals if verdicts[p.plan] == "within"]
    undecided = [p for p in rivals if verdicts[p.plan] == "open"]
    n = full.quality.n
    if within:
        best = max(within, key=lambda p: _merit(p, within, objective))
        reason = _praise(best, within, full, max_drop, objective)
        better = [p for p in undecided if _clearly_better(p, best, objective)]
        if not better:
            return Recommendation(mode, best.plan, reason, verdicts, None)
        rival = max(better, key=lambda p: _merit(p, better, objective))
        reason += f"; {rival.plan} may do better, but is {_not_separable(rival, floor, n)}"
        return Recommendation(mode, best.plan, reason, verdicts, _samples(rival, floor, n))
    if undecided:
        best = max(undecided, key=_quality)
        several = len(undecided) > 1
        cover = f"the intervals of {len(undecided)} plans cover" if several else "the interval of 1 plan covers"
        doubt = f"{_not_separable(best, floor, n)}: {cover} a drop of {max_drop:.0%}"
        reason = f"{doubt}; likeliest so far: {best.plan}, {_kept(best)}"
        return Recommendation(mode, None, reason, verdicts, _samples(best, floor, n))
    nearest = max(rivals, key=lambda p: _quality(p))
    reason = f"{baseline}: no plan stays within {max_drop:.0%} of it; nearest is {nearest.plan}, {_kept(nearest)}"
    return Recommendation(mode, baseline, reason, verdicts, None)


def check(max_drop: float, objective: str) -> None:
    """Raise ArgumentError for settings that `recommend` cannot take."""
    require(0 <= max_drop < 1, "max-drop", max_drop, "a share of full's accuracy, 0 ≤ max-drop < 1")
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)


def samples_needed(value: float, low: float, high: float, floor: float, n: int) -> int:
    """Prompts with which an interval (low, high) around `value` would leave `floor` outside: its half-width falls as
    1/√n.

    At least n + 1, at most MOST_SAMPLES.
    """
    gap = value - floor
    half = value - low if gap > 0 else high - value
    if gap == 0 or not math.isfinite(half):
        return MOST_SAMPLES
    return max(n + 1, min(MOST_SAMPLES, math.ceil(n * (half / gap) ** 2 * 1.05)))


def _verdict(plan: PlanSummary, floor: float) -> Verdict:
    assert plan.quality is not None
    if plan.quality.low >= floor:
        return "within"
    return "out" if plan.quality.high < floor else "open"


def _samples(plan: PlanSummary, floor: float, n: int) -> int:
    q = plan.quality
    assert q is not None
    return samples_needed(q.value, q.low, q.high, floor, n)


def _merit(plan: PlanSummary, among: Sequence[PlanSummary], objective: Objective) -> tuple[float, float]:
    """Sorts plans: what is asked for in steps of ALIKE, then quality."""
    quality = _quality(plan)
    if objective == "accuracy":
        return quality, -_bytes(plan)
    if objective == "memory":
        cost, least = _bytes(plan), min(map(_bytes, among))
    else:
        cost, least = plan.step_s, min(p.step_s for p in among)
    return (0.0, quality) if cost <= least * (1 + ALIKE) else (-cost / least, quality)


def _clearly_better(plan: PlanSummary, best: PlanSummary, objective: Objective) -> bool:
    if objective == "memory":
        return _bytes(plan) < _bytes(best) * (1 - ALIKE)
    if objective == "latency":
        return plan.step_s < best.step_s * (1 - ALIKE)
    return _quality(plan) > _quality(best)


def _praise(
    best: PlanSummary, within: Sequence[PlanSummary], full: PlanSummary, max_drop: float, objective: Objective
) -> str:
    said = f"{best.plan}: {_kept(best)}"
    superlative = {"memory": "smallest", "latency": "fastest", "accuracy": "most accurate"}[objective]
    alike = [p for p in within if _merit(p, within, objective)[0] == _merit(best, within, objective)[0]]
    if objective == "latency":
        said += f", decoding {full.step_s / best.step_s:.2f} times as fast"
    said += f"; {superlative} within {max_drop:.0%} of {full.plan}"
    if len(alike) > 1 and objective != "accuracy":
        said += f", and the most accurate of the {len(alike)} plans that are alike in that"
    return said


def _kept(plan: PlanSummary) -> str:
    q = plan.quality
    assert q is not None
    memory = "" if plan.memory is None else f" at {plan.memory:.0%} of its KV bytes"
    return f"{q.value:.0%} [{_percent(q.low)}, {_percent(q.high)}] of full's accuracy{memory}"


def _not_separable(plan: PlanSummary, floor: float, n: int) -> str:
    wanted = _samples(plan, floor, n)
    doubt = ", and even that may not tell" if wanted >= MOST_SAMPLES else ""
    return f"not separable with n={n}; run --samples {wanted}{doubt}"


def _quality(plan: PlanSummary) -> float:
    assert plan.quality is not None
    return plan.quality.value


def _bytes(plan: PlanSummary) -> float:
    return plan.prompt_bytes


def _percent(share: float) -> str:
    return "∞" if math.isinf(share) else f"{100 * share:.0f}"
