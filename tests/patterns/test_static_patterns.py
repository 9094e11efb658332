"""Patterns of single papers: each against a definition of its own in plain Python, on random sizes, heads and rows."""

from __future__ import annotations

import operator
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.strategies import POSITIONS, Case, by_hand, pooled, simple
from tests.patterns.test_pattern_tiles import check_random_ranges

from regard.patterns import (
    Pattern,
    aki_modality_mutual_attention,
    bamm,
    ee_mllm,
    flashattention,
    longlora,
    moa_mixture_of_sparse_attention,
    next_block_prediction,
    power_attention,
    s2_attention,
    sinklora,
    tokens,
)

POWERS = {0, *(2**p for p in range(20))}
few = settings(max_examples=20, deadline=None)
flags = st.lists(st.booleans(), min_size=POSITIONS, max_size=POSITIONS)
few_rows = st.lists(flags, min_size=1, max_size=2)


def _ids(rows: list[list[int]], dtype: torch.dtype = torch.bool) -> torch.Tensor:
    return torch.tensor(rows if len(rows) > 1 else rows[0], dtype=dtype)


def _tokens(rows: list[list[bool]], of: str) -> Case:
    return tokens(_ids(rows), of), lambda b, h, i, j: rows[b % len(rows)][j if of == "keys" else i]


def _bamm(rows: list[list[bool]]) -> Case:
    def allowed(b: int, h: int, i: int, j: int) -> bool:
        given = rows[b % len(rows)]
        return given[j] or (not given[i] and j <= i)

    return bamm(_ids(rows)), allowed


def _ee_mllm(rows: list[list[bool]]) -> Case:
    return ee_mllm(_ids(rows)), lambda b, h, i, j: i == j if rows[b % len(rows)][i] else j <= i


def _turns(ranks: list[int]) -> list[int]:
    """Read from left to right, as a person would."""
    turns, turn, last, gap = [], 0, None, False
    for rank in ranks:
        if rank < 0:
            gap = True
        else:
            again = last is not None and gap and rank == last == max(ranks)
            turn += bool((last is not None and rank < last) or again)
            last, gap = rank, False
        turns.append(turn)
    return turns


def _mutual(rows: list[list[int]]) -> Case:
    turns = [_turns(row) for row in rows]

    def allowed(b: int, h: int, i: int, j: int) -> bool:
        rank, turn = rows[b % len(rows)], turns[b % len(rows)]
        return j <= i or (0 <= rank[i] < rank[j] and turn[i] == turn[j])

    return aki_modality_mutual_attention(_ids(rows, torch.int32)), allowed


def _power(window: int, sinks: int, block: int) -> Case:
    def allowed(b: int, h: int, i: int, j: int) -> bool:
        back = i // block - j // block
        return j <= i and (back < window or j // block < sinks or back in POWERS)

    return power_attention(window, sinks, block), allowed


def _s2(kv_heads: int, group: int, local: int, stride: int, block: int, offset: int, dense: int) -> Case:
    def allowed(b: int, h: int, i: int, j: int) -> bool:
        head, qb, kb = h // group, i // block, j // block
        column = (kb + head * max(1, stride // kv_heads) + offset) % stride == 0
        return j <= i and (qb - kb < local or column or head >= kv_heads - dense)

    dense = min(dense, kv_heads)
    settings = {"local": local, "stride": stride, "block": block, "offset": offset, "dense": dense}
    return s2_attention(kv_heads * group, kv_heads=kv_heads, **settings), allowed


def _moa(rules: list[tuple[float, float]], group: int, block: int, n: int) -> Case:
    def allowed(b: int, h: int, i: int, j: int) -> bool:
        alpha, beta = rules[h // group]
        window = max(1, int(alpha // block + beta * (n / block)))
        return j <= i and (i // block - j // block < window or j // block == 0)

    return moa_mixture_of_sparse_attention(rules, group=group, block=block).bind(n), allowed


def _sinklora(half: int, half_group: int, sinks: int, rho: float, border: str, groups: int) -> Case:
    group, n = 2 * half_group, 2 * half_group * groups
    moved = int(rho * half * 2 + 1) // 2  # halves rounded up

    def allowed(b: int, h: int, i: int, j: int) -> bool:
        shift = half_group if half <= h < half + moved else 0
        if border == "wrapped":
            together = ((i - shift) % n) // group == ((j - shift) % n) // group
        else:
            together = (i + shift) // group == (j + shift) // group
        return j <= i and (together or j < sinks)

    if sinks == 0 and rho == 1:
        return longlora(2 * half, group, border=border, length=n), allowed
    return sinklora(2 * half, group, sinks=sinks, rho=rho, border=border, length=n), allowed


def _next_block(block: int, condition: int) -> Case:
    def allowed(b: int, h: int, i: int, j: int) -> bool:
        if j < condition:
            return True
        return i >= condition and (j - condition) // block <= (i - condition) // block

    return next_block_prediction(block, condition), allowed


def _layout(seed: int, rows: int, columns: int, block: tuple[int, int], share: float) -> Case:
    layout = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    return flashattention(layout, block), lambda b, h, i, j: bool(layout[i // block[0], j // block[1]])


small, rank = st.integers(1, 5), st.integers(-1, 2)
ranks = st.one_of(
    st.lists(rank, min_size=POSITIONS, max_size=POSITIONS),
    st.lists(st.tuples(rank, st.integers(1, 9)), min_size=1, max_size=9).map(
        lambda runs: ([r for r, times in runs for _ in range(times)] + [-1] * POSITIONS)[:POSITIONS]
    ),
)
rule = st.tuples(st.integers(-6, 12), st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 1.0]))
CASES: dict[str, st.SearchStrategy[Case]] = {
    "tokens": st.builds(_tokens, few_rows, st.sampled_from(["keys", "queries"])),
    "bamm": st.builds(_bamm, few_rows),
    "ee-mllm": st.builds(_ee_mllm, few_rows),
    "aki": st.builds(_mutual, st.lists(ranks, min_size=1, max_size=2)),
    "power": st.builds(_power, small, st.integers(0, 2), st.integers(1, 4)),
    "s2": st.builds(
        _s2, st.integers(1, 3), st.integers(1, 2), small, small, small, st.integers(0, 4), st.integers(0, 2)
    ),
    "moa": st.builds(_moa, st.lists(rule, min_size=1, max_size=3), st.integers(1, 2), small, st.integers(1, POSITIONS)),
    "sinklora": st.builds(
        _sinklora,
        st.integers(1, 3),
        small,
        st.integers(0, 5),
        st.sampled_from([0, 0.25, 0.5, 1]),
        st.sampled_from(["leak-free", "wrapped"]),
        small,
    ),
    "next-block": st.builds(_next_block, small, st.integers(0, 9)),
    "layout": st.builds(
        _layout,
        st.integers(0, 99),
        st.integers(3, 8),
        st.integers(3, 8),
        st.tuples(small, small),
        st.sampled_from([0.5, 0.9]),
    ),
}


@pytest.mark.parametrize("key", CASES)
@few
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_rule_and_exact_tiles(key: str, data: st.DataObject, seed: int) -> None:
    case: Case = data.draw(CASES[key])
    p = case[0]
    n = data.draw(st.integers(1, min(POSITIONS, p.extent or POSITIONS)))
    dense = by_hand(case, n, n, 0)
    assert torch.equal(p.dense(n), dense)
    assert p.exact
    check_random_ranges(p, dense, seed)
    block = data.draw(st.tuples(small, small))
    assert torch.equal(p.block_map(n, block=block, heads=p.heads or 1).expand(), pooled(dense, block))


@settings(max_examples=25, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_they_compose_with_others(data: st.DataObject, seed: int) -> None:
    """Any of them with any pattern of the library, under &, | and ~."""
    mine: Case = data.draw(st.one_of(*CASES.values()))
    other: Case = data.draw(simple)
    if None not in (mine[0].rows, other[0].rows):
        other = CASE_CAUSAL
    n = data.draw(st.integers(1, min(20, mine[0].extent or 20)))
    join = data.draw(st.sampled_from([operator.and_, operator.or_]))
    p, allowed = join(mine[0], ~other[0]), join
    dense = by_hand((p, lambda *at: allowed(bool(mine[1](*at)), not other[1](*at))), n, n, 0)
    assert torch.equal(p.dense(n), dense)
    check_random_ranges(p, dense, seed)


CASE_CAUSAL: Case = (power_attention(1, 0, 1), _power(1, 0, 1)[1])


def test_every_pattern_maps_a_long_context_by_index_arithmetic() -> None:
    """131,072 × 131,072 in tiles of 256: no entry is ever looked at, so a rule that is called fails."""
    n = 131_072
    place = torch.arange(n)
    patterns: list[Pattern] = [
        tokens(place % 1000 == 0),
        bamm(place % 3 == 0),
        ee_mllm((place > 10) & (place < 3000)),
        aki_modality_mutual_attention(torch.where(place < 4000, 0, torch.where(place < 9000, 1, -1))),
        power_attention(),
        next_block_prediction(256, 0, n),
        flashattention(torch.rand(1024, 1024) < 0.1),
    ]
    for p in patterns:
        object.__setattr__(p, "rule", _never)
        assert p.block_map(n, block=256).kinds.shape == (1, 1, 512, 512)
    assert reduce(operator.and_, patterns[:2]).extent == n


def _never(*_: object) -> None:
    raise AssertionError("an entry was looked at")
