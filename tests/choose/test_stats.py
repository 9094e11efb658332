"""Intervals against published and exactly known values, and what they must do at the edges."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from regard.choose.stats import (
    Interval,
    interval_of,
    likelihood_draws,
    mean_interval,
    ratio_draws,
    student_quantile,
    wilson,
)
from regard.errors import ArgumentError


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 1 - 0.1170, 1.0),
    ],
)
def test_wilson_gives_newcombes_figures(right: int, n: int, low: float, high: float) -> None:
    made = wilson(right, n)
    assert made.value == right / n and made.n == n
    assert made.low == pytest.approx(low, abs=6e-5) and made.high == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize(
    ("dof", "t"), [(1, 12.70620474), (2, 4.30265273), (3, 3.18244631), (7, 2.36462425), (30, 2.04227246)]
)
def test_student_quantiles_are_those_of_the_tables(dof: int, t: float) -> None:
    assert student_quantile(dof) == pytest.approx(t, abs=1e-7)


def test_mean_interval_by_hand() -> None:
    made = mean_interval([1.0, 2.0, 3.0, 6.0])  # mean 3, s² = 14/3, s/√n = 1.0801
    half = 3.18244631 * math.sqrt(14 / 3 / 4)
    assert (made.value, made.low, made.high) == pytest.approx((3.0, 3 - half, 3 + half))
    assert mean_interval([2.0]) == Interval(2.0, -math.inf, math.inf, 1)


def test_eight_of_eight_twice_is_not_certain() -> None:
    made = interval_of(1.0, ratio_draws([1] * 8, [1] * 8, rng()), 8)
    assert made.low < 0.85 and made.high > 1.1


def test_ratio_narrows_with_prompts_and_centres_on_what_was_seen() -> None:
    widths = []
    for n in (8, 32, 128, 512):
        plan = ([1, 1, 1, 0] * n)[:n]
        draws = ratio_draws(plan, [1] * n, rng())
        assert draws.mean() == pytest.approx(0.75, abs=0.01)
        made = interval_of(0.75, draws, n)
        widths.append(made.high - made.low)
    for wide, narrow in itertools.pairwise(widths):
        assert 0.4 < narrow / wide < 0.62  # a quarter of the variance


def test_pairing_uses_which_prompts_were_lost() -> None:
    full = [1, 1, 1, 1, 0, 0, 0, 0] * 8
    same, crossed = full, full[::-1]  # the same accuracies, on the same prompts and on the opposite ones
    spread = [float(ratio_draws(plan, full, rng()).std()) for plan in (same, crossed)]
    assert spread[1] > 4 * spread[0]


def test_coverage_of_the_paired_ratio_at_sixteen_prompts() -> None:
    truth, inside, trials = 0.8 / 0.95, 0, 300
    source = np.random.default_rng(7)
    for _ in range(trials):
        u = source.random(16)
        full, plan = (u < 0.95).astype(float), (u < 0.8).astype(float)
        made = interval_of(plan.mean() / full.mean(), ratio_draws(plan, full, source, draws=400), 16)
        inside += made.low <= truth <= made.high
    assert inside / trials > 0.9


def test_likelihood_ratio_matches_students_interval() -> None:
    source = np.random.default_rng(3)
    full = list(source.normal(2.5, 0.5, 12))
    plan = [f + 0.1 + d for f, d in zip(full, source.normal(0, 0.05, 12), strict=True)]
    made = interval_of(0.0, np.log(likelihood_draws(plan, full, rng(), draws=20000)), 12)
    exact = mean_interval([f - p for f, p in zip(full, plan, strict=True)])
    assert made.low == pytest.approx(exact.low, abs=0.006)
    assert float(np.quantile(likelihood_draws(full, full, rng()), 0.1)) == 1.0  # no difference, no doubt


def test_one_prompt_proves_nothing() -> None:
    made = interval_of(0.9, likelihood_draws([2.1], [2.0], rng()), 1)
    assert made.low == 0 and made.high == math.inf


def test_bad_scores_are_refused() -> None:
    with pytest.raises(ArgumentError, match="2 and 1 scores"):
        ratio_draws([1, 0], [1], rng())
    with pytest.raises(ArgumentError, match="1 \\(right\\) or 0 \\(wrong\\)"):
        ratio_draws([0.5], [1], rng())
    with pytest.raises(ArgumentError, match="full: got 0 right"):
        ratio_draws([1.0], [0.0], rng())
    with pytest.raises(ArgumentError, match="right: got 3 of 2"):
        wilson(3, 2)
