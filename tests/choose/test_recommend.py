"""Who is recommended, and when nobody is."""

from __future__ import annotations

import pytest
from tests.choose.made_up import records

from regard.choose.recommend import MOST_SAMPLES, recommend, samples_needed
from regard.choose.stats import Interval
from regard.choose.summary import PlanSummary, summarize
from regard.errors import ArgumentError


def plan(name: str, value: float, low: float, high: float, *, held: float = 130.0, step: float = 0.05) -> PlanSummary:
    return PlanSummary(
        plan=name,
        mode="aware",
        tasks=(),
        quality=Interval(value, low, high, 32),
        memory=held / 1000,
        first_token_s=1.0,
        step_s=step,
        prompt_bytes=held,
        read_bytes=held,
        peak_bytes=1000,
    )


FULL = plan("full", 1, 1, 1, held=1000, step=0.1)


def test_the_reason_says_accuracy_interval_and_memory() -> None:
    made = recommend([FULL, plan("snapkv 512", 0.98, 0.96, 0.99)], "full")
    assert made.plan == "snapkv 512" and made.samples is None
    assert "98% [96, 99] of full's accuracy at 13% of its KV bytes" in made.reason
    assert "smallest within 5% of full" in made.reason


def test_each_objective_takes_its_own() -> None:
    plans = [
        FULL,
        plan("small", 0.96, 0.955, 0.97, held=100, step=0.08),
        plan("fast", 0.97, 0.96, 0.98, held=300, step=0.02),
        plan("exact", 0.99, 0.98, 1.0, held=500, step=0.09),
    ]
    chosen = {o: recommend(plans, "full", objective=o).plan for o in ("memory", "latency", "accuracy")}
    assert chosen == {"memory": "small", "latency": "fast", "accuracy": "exact"}


def test_among_equals_in_memory_the_more_accurate_wins() -> None:
    plans = [FULL, plan("a", 0.96, 0.955, 0.97, held=100), plan("b", 0.98, 0.96, 1, held=103)]
    assert recommend(plans, "full").plan == "b"


def test_an_interval_over_the_limit_names_no_winner() -> None:
    made = recommend([FULL, plan("open", 0.97, 0.90, 1.02), plan("bad", 0.3, 0.2, 0.4)], "full")
    assert made.plan is None and made.verdicts == {"open": "open", "bad": "out"}
    assert made.samples == samples_needed(0.97, 0.90, 1.02, 0.95, 32)
    assert f"not separable with n=32; run --samples {made.samples}" in made.reason


def test_max_drop_moves_the_limit() -> None:
    plans = [FULL, plan("p", 0.9, 0.86, 0.94)]
    assert recommend(plans, "full", max_drop=0.05).plan == "full"
    assert recommend(plans, "full", max_drop=0.1).plan is None
    assert recommend(plans, "full", max_drop=0.15).plan == "p"


def test_an_undecided_plan_that_may_be_better_is_mentioned() -> None:
    made = recommend([FULL, plan("sure", 0.99, 0.96, 1, held=500), plan("maybe", 0.96, 0.9, 1, held=100)], "full")
    assert made.plan == "sure" and "maybe may do better, but is not separable" in made.reason and made.samples


def test_all_out_recommends_full_and_says_what_came_nearest() -> None:
    made = recommend([FULL, plan("x", 0.5, 0.4, 0.6), plan("y", 0.7, 0.6, 0.8)], "full")
    assert made.plan == "full" and "no plan stays within 5%" in made.reason and "nearest is y, 70%" in made.reason


def test_samples_follow_the_square_root_law() -> None:
    assert samples_needed(0.98, 0.92, 1.0, 0.95, 8) == 34  # half-width 0.06 must become 0.03: four times, and 5 % more
    assert samples_needed(0.95, 0.9, 1.0, 0.95, 8) == MOST_SAMPLES
    assert samples_needed(0.99, 0.9499, 1.0, 0.95, 8) == 9
    assert samples_needed(0.90, 0.86, 0.96, 0.95, 10) == 16  # below the limit the upper half counts


def test_settings_are_checked() -> None:
    with pytest.raises(ArgumentError, match=r"max-drop: got 1\.0"):
        recommend([FULL], "full", max_drop=1.0)
    with pytest.raises(ArgumentError, match="did you mean memory"):
        recommend([FULL], "full", objective="memroy")  # type: ignore[arg-type]


def test_without_a_rival_or_a_baseline_there_is_no_recommendation() -> None:
    assert recommend([FULL], "full").plan is None
    assert recommend([plan("p", 1, 1, 1)], "full").plan is None


def test_summaries_of_made_up_records() -> None:
    found = summarize(records(plans={"full": 1.0, "good": 1.0, "bad": 0.5}, n=8), ["full", "good", "bad"], "full")
    full, good, bad = found.of("aware")
    assert full.quality == Interval(1, 1, 1, 8) and good.quality and bad.quality and good.quality.n == 8
    assert good.quality.value == 1 and good.quality.low < 1 < good.quality.high
    assert bad.quality.value == pytest.approx((0.5 + 2**-0.5) / 2)  # needle halved; perplexity 2^½ times as high
    assert bad.memory == pytest.approx(0.1) and bad.first_token_s == 2.0 and bad.tokens_per_s == pytest.approx(20)
    needle, perplexity = bad.tasks
    assert (needle.interval.value, needle.measure) == (0.5, "match") and perplexity.interval.value > 1


def test_a_task_that_full_fails_is_left_out_and_said() -> None:
    found = summarize(records(plans={"full": 0.0, "p": 0.0}, n=4), ["full", "p"], "full")
    assert found.left_out == ("needle (aware): full itself is right on 0%",)
    assert found.of("aware")[1].quality is not None  # perplexity is left
