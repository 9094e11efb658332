"""DuoAttention: which heads retrieve, how a budget is shared out, what grows."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from tests.inference.policy_views import Prompt, sealed, view_of

from regard.errors import ArgumentError
from regard.inference.apply import select
from regard.inference.budget import UNLIMITED
from regard.inference.policies.duoattention import DuoAttention

TABLE = ((0.9, 0.1), (0.4, 0.6))


def spread(policy: DuoAttention, p: Prompt) -> list[list[int]]:
    """Entries kept by layer and head."""
    layers = len(policy.heads.scores)
    return [[len(lane) for lane in sealed(policy, p, layer=layer)[0]] for layer in range(layers)]


def test_duoattention_keeps_all_of_retrieval_heads_and_sinks_and_window_of_the_others() -> None:
    policy = DuoAttention(table=TABLE, sparsity=0.5, sinks=2, recent=3)
    assert sealed(policy, Prompt(9), layer=0) == [[list(range(9)), [0, 1, 6, 7, 8]]]
    assert sealed(policy, Prompt(9), layer=1) == [[[0, 1, 6, 7, 8], list(range(9))]]
    assert sealed(policy, Prompt(4), layer=0) == [[[0, 1, 2, 3]] * 2]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.6, 0.75, 0.9, 1.0])
def test_duoattention_cuts_at_the_quantile(sparsity: float) -> None:
    scores = torch.rand(2, 2, dtype=torch.float64)
    policy = DuoAttention(table=tuple(map(tuple, scores.tolist())), sparsity=sparsity, sinks=1, recent=2)
    cut = torch.quantile(scores.flatten(), sparsity) if sparsity < 1 else torch.inf
    assert spread(policy, Prompt(9)) == torch.where(scores >= cut, 9, 3).tolist()


def test_duoattention_breaks_ties_by_place() -> None:
    assert spread(DuoAttention(table=((1, 1), (1, 1)), sparsity=0.5, sinks=1, recent=2), Prompt(9)) == [[9, 9], [3, 3]]


def test_duoattention_spends_its_budget_to_the_token() -> None:
    for budget in (1, 2, 3, 4, 5, 7, 11, 12, 13, 20, 0.29, 0.5):
        for n in (5, 12, 13):
            policy = DuoAttention(table=TABLE, budget=budget, sinks=1, recent=3)
            got = [entries for layer in spread(policy, Prompt(n)) for entries in layer]
            wanted = budget if isinstance(budget, int) else int(Fraction(str(budget)) * n)
            assert sum(got) == 4 * min(wanted, n), (budget, n, got)
            if wanted < n:
                window = min(4, wanted)
                full = max(r for r in range(4) if r * n + (4 - r) * window <= 4 * wanted)
                assert sum(x == n for x in got) >= full and min(got) >= window, (budget, n, got)
                assert sorted(got, reverse=True) == [got[i] for i in (0, 3, 2, 1)], "in the order of the scores"


def test_duoattention_shrinks_the_window_before_the_sinks() -> None:
    assert sealed(DuoAttention(table=TABLE, budget=4, sinks=2, recent=5), Prompt(9)) == [[[0, 1, 7, 8]] * 2]
    assert sealed(DuoAttention(table=TABLE, budget=2, sinks=2, recent=5), Prompt(9)) == [[[0, 8]] * 2]


def test_duoattention_grows_in_retrieval_heads_only() -> None:
    view = view_of([Prompt(9)])
    assert DuoAttention(table=TABLE, sparsity=0.5, sinks=2, recent=3).limits(view).tolist() == [[UNLIMITED, 5]]
    enough = DuoAttention(table=TABLE, budget=9, sinks=2, recent=3)
    assert enough.limits(view).tolist() == [[UNLIMITED, UNLIMITED]], "what the prompt does not exceed limits nothing"


def test_duoattention_refuses_a_table_of_another_model() -> None:
    policy = DuoAttention(table=((1.0, 2.0, 3.0),), sparsity=0.5)
    with pytest.raises(ArgumentError, match=r"DuoAttention\.table: got 1 × 3; allowed: scores for 2 layers of 2"):
        select(policy, view_of([Prompt(9)]))
