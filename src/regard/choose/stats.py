"""Intervals that stay honest at eight prompts.

A proportion has Wilson's interval. A comparison of two plans is paired: both saw the same prompts, so the prompts are
resampled, never the answers apart. Two corrections keep small samples from looking certain: right/wrong pairs are drawn
from a posterior (the Bayesian bootstrap of Rubin 1981, with half a pseudo-prompt in each of the four outcomes), since
eight successes in eight say nothing of width to a plain bootstrap; means of continuous values have their bootstrap
deviations expanded by t·√(n/(n−1)) (Hesterberg 2015, “What Teachers Should Know About the Bootstrap”).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regard.errors import require

Z95 = 1.959963984540054
DRAWS = 4000
PSEUDO = 0.5
"""Half a prompt for each outcome of a pair: (right, right), (right, wrong), (wrong, right), (wrong, wrong)."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval, and the number of prompts behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson(right: int, n: int) -> Interval:
    """Wilson's score interval (1927) of a proportion of `right` among `n`, both counts."""
    require(n >= 1 and 0 <= right <= n, "right", f"{right} of {n}", "0 ≤ right ≤ n, n ≥ 1")
    share, z2 = right / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if right == 0 else max(0.0, centre - half)  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if right == n else min(1.0, centre + half)
    return Interval(share, low, high, n)


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean. One value alone has an infinite one."""
    n = len(values)
    require(n >= 1, "values", "none", "at least one")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    half = student_quantile(n - 1) * spread
    return Interval(mean, mean - half, mean + half, n)


def ratio_draws(plan: Sequence[float], full: Sequence[float], rng: np.random.Generator, draws: int = DRAWS) -> Array:
    """(draws,) samples of mean(plan)/mean(full) for right/wrong answers, 1 or 0, to the same prompts in the same
    order."""
    pairs = _paired(plan, full)
    require(bool(np.isin(pairs, (0.0, 1.0)).all()), "plan", "other values", "1 (right) or 0 (wrong)")
    require(bool(pairs[:, 1].any()), "full", "0 right", "at least one right answer: a ratio to nothing has no value")
    cells = [((pairs[:, 0] == p) & (pairs[:, 1] == f)).sum() for p, f in ((1, 1), (1, 0), (0, 1), (0, 0))]
    both, plan_only, full_only, _ = rng.dirichlet(np.array(cells) + PSEUDO, size=draws).T
    ratios = (both + plan_only) / (both + full_only)
    observed = pairs[:, 0].mean() / pairs[:, 1].mean()
    return np.asarray(
        np.maximum(ratios - ratios.mean() + observed, 0.0)
    )  # the pseudo-prompts widen, and must not shift


def likelihood_draws(
    plan: Sequence[float], full: Sequence[float], rng: np.random.Generator, draws: int = DRAWS
) -> Array:
    """(draws,) samples of perplexity(full)/perplexity(plan) = exp(mean(full − plan)), from mean negative
    log-likelihoods.

    One prompt tells nothing of the spread: the draws are then 0 and infinity by halves.
    """
    pairs = _paired(plan, full)
    difference = pairs[:, 1] - pairs[:, 0]
    n = len(difference)
    if n == 1:
        return np.where(np.arange(draws) % 2 == 0, 0.0, np.inf)
    means = difference[rng.integers(0, n, size=(draws, n))].mean(axis=1)
    wider = student_quantile(n - 1) / Z95 * math.sqrt(n / (n - 1))
    return np.asarray(np.exp(difference.mean() + wider * (means - difference.mean())))


def interval_of(value: float, draws: Array, n: int) -> Interval:
    """The central 95 % of draws around a value measured on n prompts."""
    low, high = np.quantile(draws, (0.025, 0.975), method="inverted_cdf")
    return Interval(value, min(float(low), value), max(float(high), value), n)


def student_quantile(dof: int, level: float = 0.975) -> float:
    """The t with P(T ≤ t) = level > 1/2 for whole degrees of freedom: bisection of the closed form."""
    require(dof >= 1, "dof", dof, "an integer ≥ 1")
    low, high = 0.0, 1.0
    while _student_cdf(high, dof) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, dof) < level else (low, middle)
    return (low + high) / 2


def _student_cdf(t: float, dof: int) -> float:
    """P(T ≤ t) for t ≥ 0 (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(theta), math.cos(theta)
    if dof % 2:
        total, term = 0.0, cosine
        for k in range(1, (dof - 1) // 2 + 1):
            total += term
            term *= cosine**2 * 2 * k / (2 * k + 1)
        inside = 2 / math.pi * (theta + sine * total)
    else:
        total, term = 0.0, 1.0
        for k in range(1, dof // 2 + 1):
            total += term
            term *= cosine**2 * (2 * k - 1) / (2 * k)
        inside = sine * total
    return 0.5 + inside / 2


def _paired(plan: Sequence[float], full: Sequence[float]) -> Array:
    same = len(plan) == len(full) > 0
    require(same, "plan and full", f"{len(plan)} and {len(full)} scores", "as many scores of each, at least one")
    return np.stack([np.asarray(plan, dtype=np.float64), np.asarray(full, dtype=np.float64)], axis=1)
