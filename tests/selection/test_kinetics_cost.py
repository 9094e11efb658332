"""Kinetics' cost model against sums written out token by token."""

from __future__ import annotations

from itertools import combinations

import pytest

from regard.errors import ArgumentError
from regard.selection.kinetics_cost import DecodedModel, block_top_k, coverage, dense, tokens_read, top_k

QWEN3_8B = DecodedModel(parameters=8.19e9, query_heads=32, kv_heads=8, width=128 * 36)
QWEN3_06B = DecodedModel(parameters=0.752e9, query_heads=16, kv_heads=8, width=128 * 28)


@pytest.mark.parametrize("trials", [1, 4])
def test_dense_is_the_sum_over_tokens(trials: int) -> None:
    model, prompt, generated = DecodedModel(1000.0, 4, 2, 24), 60, 400
    seen = [prompt + t for t in range(1, generated + 1)]
    flop = trials * sum(2 * 1000.0 + 4 * 4 * 24 * n for n in seen)  # q·k and weight·v, 2 FLOP per multiply-add
    read = sum(4 * 2 * 24 * (prompt + trials * (n - prompt)) for n in seen)  # k and v, 2 bytes, the prompt shared
    cost = dense(model, prompt, generated, trials=trials)
    assert cost.flop == pytest.approx(flop, rel=0.01) and cost.bytes == pytest.approx(read, rel=0.01)
    assert cost.eflops(10.0) == cost.flop + 10 * cost.bytes


def test_a_budget_of_everything_is_dense_and_more_changes_nothing() -> None:
    full = dense(QWEN3_8B, 1024, 4096)
    for budget in (5120, 6000, 10**9):
        sparse = top_k(QWEN3_8B, 1024, 4096, budget)
        assert sparse.flop == pytest.approx(full.flop, rel=1e-12)
        assert sparse.bytes == pytest.approx(full.bytes, rel=1e-12)


@pytest.mark.parametrize("budget", [1, 50, 100, 101, 350, 500, 900])
def test_the_closed_form_is_the_sum_within_the_length(budget: int) -> None:
    exact = sum(min(budget, 100 + t) for t in range(1, 401))
    assert 0 <= exact - tokens_read(100, 400, budget) <= 400


def test_the_search_costs_one_key_a_block() -> None:
    plain, searched = top_k(QWEN3_8B, 1024, 4096, 512), block_top_k(QWEN3_8B, 1024, 4096, 512, block=16)
    assert searched.bytes - plain.bytes == (2048 + 4096) // 16 * 4096 * 8 * QWEN3_8B.width
    assert searched.flop - plain.flop == (2048 + 4096) // 16 * 4096 * 32 * QWEN3_8B.width


def test_long_generation_is_attention_first_and_more_so_in_a_small_model() -> None:
    ratios = []
    for model in (QWEN3_8B, QWEN3_06B):
        parameters = 2 * model.parameters * 32768
        ratios.append((dense(model, 1024, 32768).eflops() - parameters) / parameters)
    assert ratios[0] > 5 and ratios[1] > 3 * ratios[0]


def test_coverage_is_the_share_of_draws_with_a_correct_one() -> None:
    correct = [True, True, False, False, False, False, False]
    draws = list(combinations(correct, 3))
    assert coverage(7, 2, 3) == pytest.approx(sum(any(d) for d in draws) / len(draws))
    assert coverage(7, 0, 3) == 0 and coverage(7, 6, 2) == 1


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"^budget: got 0"):
        top_k(QWEN3_8B, 1, 1, 0)
    with pytest.raises(ArgumentError, match=r"^generated: got 0"):
        dense(QWEN3_8B, 1, 0)
    with pytest.raises(ArgumentError, match=r"^n: got 8"):
        coverage(7, 2, 8)
