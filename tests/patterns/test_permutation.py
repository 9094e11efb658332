"""Tokens in tile order: the order itself, patterns under it, the choice of a tile, and attention through it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.grid_cases import in_tiles, layouts, neighborhood_settings
from tests.patterns.strategies import pooled
from tests.patterns.test_pattern_tiles import check_random_ranges

from regard.attend import attend
from regard.attend_tiled import attend_tiled, tiling_of
from regard.errors import ArgumentError
from regard.patterns import Pattern, causal, clear, documents, full, halonet, neighborhood, per_head, sliding_window
from regard.patterns.permutation import Tiling, best_tile, permuted
from regard.patterns.simulator import simulate


@st.composite
def tilings(draw: st.DrawFn, most: int = 36) -> Tiling:
    layout = draw(layouts(most))
    tile = tuple(draw(st.integers(1, min(size + 1, 5))) for size in layout)
    return Tiling(layout, tile, before=draw(st.integers(0, 3)), after=draw(st.integers(0, 2)))


@settings(max_examples=50, deadline=None)
@given(tiling=tilings())
def test_there_and_back(tiling: Tiling) -> None:
    x = torch.arange(2 * tiling.tokens).view(1, 2, -1, 1)
    there = tiling.permute(x)
    assert there.shape[2] == tiling.length
    assert torch.equal(tiling.restore(there), x)
    tokens = torch.arange(tiling.tokens * tiling.tokens).view(tiling.tokens, tiling.tokens) % 7 > 2
    token, real = tiling.token(torch.arange(tiling.length))
    assert torch.equal(tokens[token][:, token] & real[:, None] & real, in_tiles(tokens, tiling))


def test_tiles_are_contiguous() -> None:
    tiling = Tiling((4, 6), (2, 3))
    assert tiling.order().view(4, 6).tolist()[:2] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    ragged = Tiling((3, 2), (2, 2), before=1)
    assert ragged.length == 9 and ragged.tokens == 7 and ragged.block == 4
    token, real = ragged.token(torch.arange(9))
    assert token[real].tolist() == [1, 2, 3, 4, 5, 6, 0] and real.tolist() == [True] * 6 + [False] * 2 + [True]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), tiling=tilings(), seed=st.integers(0, 10**6))
def test_patterns_in_tile_order(data: st.DataObject, tiling: Tiling, seed: int) -> None:
    chosen = [data.draw(neighborhood_settings(size)) for size in tiling.layout]
    window, stride, dilation, flags = zip(*chosen, strict=True)
    grid = neighborhood(tiling.layout, window, stride, dilation, flags, before=tiling.before, after=tiling.after)
    n = tiling.tokens
    p: Pattern = data.draw(
        st.sampled_from(
            [
                grid,
                ~grid,
                causal(),
                causal() & grid,
                grid | sliding_window(3) & ~grid,
                per_head([grid, full(), ~grid]),
                documents(torch.arange(n) // 4) | grid,
            ]
        )
    )
    tiled = permuted(p, tiling)
    dense = p.dense(n)[0]
    want = torch.stack([in_tiles(head, tiling) for head in dense])[None]
    assert torch.equal(tiled.dense(tiling.length), want)
    assert tiled.exact == (p in (grid, ~grid))
    check_random_ranges(tiled, want, seed)
    block = (tiling.block, tiling.block)
    aligned = tiled.block_map(tiling.length, block=block)
    exact = pooled(want, block)
    if tiled.exact:
        assert torch.equal(aligned.expand(), exact)
    assert torch.equal(tiled.block_map(tiling.length, block=block, refine=True).expand(), exact)


def test_a_blocked_pattern_is_block_diagonal_in_its_tiles() -> None:
    tiled = permuted(neighborhood((8, 16), (4, 8), stride=(4, 8)), Tiling((8, 16), (4, 8)))
    assert torch.equal(tiled.block_map(128, block=32).kinds[0, 0], 2 * torch.eye(4, dtype=torch.uint8))


def test_the_best_tile_touches_fewest() -> None:
    p = neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8))
    assert best_tile(p) == (2, 8, 8)
    assert simulate(p, (2, 8, 8)).perfect and simulate(p, (2, 8, 8)).mean == 9 * 3 * 3
    small = neighborhood((12, 20), (4, 6), (2, 3))
    chosen = best_tile(small, 12)
    touched = {t: simulate(small, t).touched for t in ((1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1))}
    assert touched[chosen] == min(touched.values())
    both = small | causal() & small
    maps = {t: permuted(both, Tiling((12, 20), t)).block_map(Tiling((12, 20), t).length, block=12) for t in touched}
    counts = {t: int((m.kinds > 0).sum()) for t, m in maps.items()}
    assert counts[best_tile(both, 12)] == min(counts.values())
    assert best_tile(clear((16, 16), 4, text=3), 16) == (4, 4)
    assert best_tile(neighborhood(50, 5), 8) == (8,)


@pytest.mark.parametrize(
    "p",
    [
        neighborhood((6, 7), (3, 5), (2, 1)),
        neighborhood((3, 5, 4), (3, 2, 2), dilation=(1, 2, 1), causal=(True, False, False)),
        clear((6, 7), 3, text=2),
        halonet((5, 8), 2, 1) | sliding_window(4),
        per_head([neighborhood((6, 7), 3), neighborhood((6, 7), (1, 7)) & causal()]),
    ],
    ids=["2d", "3d", "text", "or", "heads"],
)
def test_attention_comes_back_in_the_callers_order(p: Pattern) -> None:
    n = p.extent
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64).requires_grad_() for h in (2, 1, 1))
    results = []
    for lse_too in (
        attend(q, k, v, pattern=p, return_lse=True, softcap=3.0),
        attend_tiled(q, k, v, pattern=p, tiling=tiling_of(p, 8), return_lse=True, softcap=3.0),
    ):
        out, lse = lse_too
        results.append((out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), (q, k, v))))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    alone = attend_tiled(q, k, v, pattern=p)
    torch.testing.assert_close(alone, attend(q, k, v, pattern=p), rtol=0, atol=1e-12)


def test_empty_slots_reach_nobody() -> None:
    """What a ragged tiling adds repeats tokens, and still is never seen."""
    p = neighborhood((3, 5), (3, 3))
    q, k, v = (torch.randn(1, 1, 15, 4, dtype=torch.float64) for _ in range(3))
    out = attend_tiled(q, k, v, pattern=p, tiling=Tiling((3, 5), (2, 4)))
    torch.testing.assert_close(out, attend(q, k, v, pattern=p), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("layout", lambda: Tiling((0, 3), (1, 1))),
        ("tile", lambda: Tiling((4, 4), (2,))),
        ("tile", lambda: Tiling((4, 4), (2, 0))),
        ("after", lambda: Tiling((4, 4), (2, 2), after=-1)),
        ("tiling", lambda: permuted(neighborhood((4, 4), 3), Tiling((4, 5), (2, 2)))),
        ("x", lambda: Tiling((4, 4), (2, 2)).permute(torch.zeros(1, 1, 15, 2))),
        ("x", lambda: Tiling((3, 4), (2, 2)).restore(torch.zeros(1, 1, 12, 2))),
        ("n", lambda: permuted(neighborhood((3, 4), 3), Tiling((3, 4), (2, 2))).bind(16)),
        ("pattern", lambda: best_tile(causal())),
        ("pattern", lambda: best_tile(neighborhood((4, 4), 3) & neighborhood((2, 8), 2))),
        ("block", lambda: best_tile(neighborhood((4, 4), 3), 0)),
        ("q", lambda: attend_tiled(*torch.zeros(3, 1, 1, 15, 4), pattern=neighborhood((4, 4), 3))),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()
