"""Neighborhoods: worked examples and identities of the cards FNA and GNA, the rule by its definition, exact tiles."""

from __future__ import annotations

import time
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.grid_cases import by_axes, layouts, neighborhood_axis, neighborhood_settings, sees, with_others
from tests.patterns.test_pattern_tiles import check_random_ranges

from regard.attend import attend, merge
from regard.errors import ArgumentError, UnsupportedError
from regard.patterns import causal, faster_neighborhood_attention, full, halonet, neighborhood, per_head
from regard.patterns.simulator import simulate


@pytest.mark.parametrize(
    ("setting", "query", "keys"),
    [
        ({"window": 5}, 0, range(5)),
        ({"window": 5}, 1, range(5)),
        ({"window": 5}, 5, range(3, 8)),
        ({"window": 5}, 11, range(7, 12)),
        ({"window": 4}, 5, range(3, 7)),
        ({"window": 4}, 0, range(4)),
        ({"window": 4}, 11, range(8, 12)),
        ({"window": 3, "dilation": 2}, 0, (0, 2, 4)),
        ({"window": 3, "dilation": 2}, 5, (3, 5, 7)),
        ({"window": 3, "dilation": 2}, 11, (7, 9, 11)),
        ({"window": 3, "dilation": 2, "layout": 11}, 9, (5, 7, 9)),
        ({"window": 3, "dilation": 2, "layout": 11}, 10, (6, 8, 10)),
        ({"window": 4, "causal": True}, 0, (0,)),
        ({"window": 4, "causal": True}, 5, (2, 3, 4, 5)),
        ({"window": 3, "dilation": 2, "causal": True}, 5, (1, 3, 5)),
        ({"window": (3, 3), "layout": (5, 5)}, 0, (0, 1, 2, 5, 6, 7, 10, 11, 12)),
        ({"window": (3, 3), "layout": (5, 5)}, 12, (6, 7, 8, 11, 12, 13, 16, 17, 18)),
        ({"window": (3, 3), "layout": (5, 5)}, 9, (2, 3, 4, 7, 8, 9, 12, 13, 14)),
        ({"window": 5, "stride": 2}, 4, range(3, 8)),
        ({"window": 5, "stride": 2}, 5, range(3, 8)),
        ({"window": 5, "stride": 2}, 6, range(5, 10)),
        ({"window": 5, "stride": 2}, 1, range(5)),
        ({"window": 5, "stride": 2}, 0, range(5)),
        ({"window": 5, "stride": 2}, 11, range(7, 12)),
        ({"window": 4, "stride": 2}, 5, range(3, 7)),
        ({"window": 4, "stride": 2}, 4, range(3, 7)),
        ({"window": 4, "stride": 2}, 6, range(5, 9)),
        ({"window": 4, "stride": 2}, 0, range(4)),
        ({"window": 4, "stride": 4}, 4, range(4, 8)),
        ({"window": 4, "stride": 4}, 5, range(4, 8)),
        ({"window": 4, "stride": 4}, 6, range(4, 8)),
        ({"window": 4, "stride": 4}, 11, range(8, 12)),
        ({"window": 6, "stride": 3}, 4, range(1, 7)),
        ({"window": 6, "stride": 3}, 5, range(1, 7)),
        ({"window": 6, "stride": 3}, 6, range(4, 10)),
        ({"window": 6, "stride": 3}, 11, range(6, 12)),
        ({"window": 5, "stride": 5}, 4, range(5)),
        ({"window": 5, "stride": 5}, 5, range(5, 10)),
        ({"window": 5, "stride": 5}, 6, range(5, 10)),
        ({"window": 5, "stride": 5}, 11, range(7, 12)),
        ({"window": 4, "stride": 2, "causal": True}, 4, (2, 3, 4)),
        ({"window": 4, "stride": 2, "causal": True}, 5, (2, 3, 4, 5)),
        ({"window": 4, "stride": 2, "causal": True}, 6, (4, 5, 6)),
        ({"window": 4, "stride": 4, "causal": True}, 4, (4,)),
        ({"window": 4, "stride": 4, "causal": True}, 6, (4, 5, 6)),
    ],
)
def test_worked_examples(setting: dict, query: int, keys: range) -> None:
    p = neighborhood(**{"layout": 12, **setting})
    assert sees(p, query, p.extent) == list(keys)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layout=layouts(), seed=st.integers(0, 10**6))
def test_rule_and_tiles(data: st.DataObject, layout: tuple[int, ...], seed: int) -> None:
    chosen = [data.draw(neighborhood_settings(size)) for size in layout]
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 2))
    window, stride, dilation, flags = zip(*chosen, strict=True)
    p = neighborhood(layout, window, stride, dilation, flags, before=before, after=after)
    axes = [neighborhood_axis(size, *setting) for size, setting in zip(layout, chosen, strict=True)]
    dense = with_others(by_axes(layout, axes), before, after)[None, None]
    assert torch.equal(p.dense(p.extent), dense)
    assert p.exact
    check_random_ranges(p, dense, seed)
    if not any(flags):
        inside = dense[0, 0, before : p.extent - after, before : p.extent - after]
        assert (inside.sum(1) == torch.tensor(window).prod()).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), size=st.integers(20, 60), seed=st.integers(0, 10**6))
def test_wide_dilations(data: st.DataObject, size: int, seed: int) -> None:
    """More residue classes than are looked at one by one."""
    window = data.draw(st.integers(1, size // 7))
    setting = (
        window,
        data.draw(st.integers(1, window)),
        data.draw(st.integers(7, size // window)),
        data.draw(st.booleans()),
    )
    dense = by_axes((size,), [neighborhood_axis(size, *setting)])[None, None]
    p = neighborhood(size, *setting)
    assert torch.equal(p.dense(size), dense)
    check_random_ranges(p, dense, seed)


def test_identities() -> None:
    n = 24
    assert torch.equal(neighborhood(n, n).dense(n), full().dense(n))
    assert torch.equal(neighborhood((4, 6), (4, 6)).dense(n), full().dense(n))
    assert torch.equal(neighborhood((4, 6), 1).dense(n)[0, 0], torch.eye(n, dtype=torch.bool))
    blocks = torch.arange(n) // 4
    assert torch.equal(neighborhood(n, 4, stride=4).dense(n)[0, 0], blocks[:, None] == blocks)
    assert neighborhood(n, 5) == faster_neighborhood_attention(n, 5)
    odd = neighborhood(n, 5).dense(n)[0, 0]
    assert torch.equal(odd, odd.flip(0).flip(1))
    strided = neighborhood(n, 6, stride=3).dense(n)[0, 0].view(8, 3, n)
    assert torch.equal(strided, strided[:, :1].expand_as(strided))
    inner = neighborhood(n, 5).dense(n)[0, 0]
    assert torch.equal(inner[3:20, 1:-1][:-1, :-1], inner[4:20, 1:-1][:, 1:])


def test_dilation_is_independent_problems_on_strided_grids() -> None:
    p = neighborhood((7, 8), (3, 2), dilation=(2, 4))
    dense = p.dense(56)[0, 0].view(7, 8, 7, 8)
    for y, x in product(range(2), range(4)):
        part = dense[y::2, x::4, y::2, x::4]
        rows, columns = part.shape[:2]
        alone = neighborhood((rows, columns), (3, 2)).dense(rows * columns)[0, 0]
        assert torch.equal(part.reshape(rows * columns, -1), alone)
    assert int(dense.sum()) == 56 * 6


@pytest.mark.parametrize("block", [1, 3, 4, 5])
def test_halonet_is_a_stride_away_from_the_border(block: int) -> None:
    halo, n = 2, 40
    halos = halonet(n, block, halo).dense(n)[0, 0]
    strided = neighborhood(n, block + 2 * halo, stride=block).dense(n)[0, 0]
    inner = slice(block + halo, (n // block - 1) * block - halo)
    assert torch.equal(halos[inner], strided[inner])
    assert not torch.equal(halos[0], strided[0])  # cut there, shifted here


@pytest.mark.parametrize(
    ("layout", "window", "stride", "sparsity"),
    [
        ((16, 44, 80), (16, 32, 48), (1, 4, 16), 0.564),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), 0.910),
        ((256, 256), (80, 80), (16, 16), 0.902),
    ],
)
def test_sparsity_of_the_papers_settings(
    layout: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...], sparsity: float
) -> None:
    cost = neighborhood(layout, window, stride).cost(tile=(1,) * len(layout))
    assert 1 - cost.density == pytest.approx(sparsity, abs=5e-4)


@pytest.mark.parametrize(
    ("size", "window", "stride", "tile", "partial", "most"),
    [
        (256, 80, 16, 16, 0, 5),
        (80, 24, 8, 8, 0, 3),
        (48, 24, 8, 8, 0, 3),
        (30, 18, 16, 2, 0, 9),
        (64, 24, 8, 8, 0, 3),
        (64, 40, 8, 8, 0, 5),
        (64, 32, 8, 8, 8, 5),
        (64, 16, 8, 8, 12, 3),
    ],
)
def test_perfect_and_imperfect_cases(size: int, window: int, stride: int, tile: int, partial: int, most: int) -> None:
    said = simulate(neighborhood(size, window, stride), tile)
    assert (said.partial, said.most, said.perfect) == (partial, most, partial == 0)
    if said.perfect and size % tile == 0:
        assert said.speedup_bound == pytest.approx(said.flop_bound)


def test_speedup_of_the_headline() -> None:
    p = neighborhood((64, 64), (24, 24), (8, 8))
    said = simulate(p, (8, 8))
    assert said.perfect and said.speedup_bound == pytest.approx(64 / 9) and said.mean == 9
    every_query = simulate(neighborhood((64, 64), (24, 24)), (8, 8))
    assert every_query.speedup_bound < 0.8 * every_query.flop_bound
    assert p.cost(4096, tile=(8, 8), heads=2).speedup_bound == pytest.approx(64 / 9)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), layout=layouts())
def test_simulator_is_a_count_of_tiles(data: st.DataObject, layout: tuple[int, ...]) -> None:
    chosen = [data.draw(neighborhood_settings(size)) for size in layout]
    window, stride, dilation, flags = zip(*chosen, strict=True)
    p = neighborhood(layout, window, stride, dilation, flags)
    tiles = [tuple(data.draw(st.integers(1, size + 1)) for size in layout) for _ in range(2)]
    said = simulate(p, *tiles)
    places = list(product(*map(range, layout)))
    of = [[tuple(x // t for x, t in zip(at, tile, strict=True)) for at in places] for tile in tiles]
    dense = p.dense(p.extent)[0, 0]
    allowed, every = torch.zeros(2, said.query_tiles, said.key_tiles, dtype=torch.long)
    names = [sorted(set(x)) for x in of]
    assert [len(x) for x in names] == [said.query_tiles, said.key_tiles]
    index = [torch.tensor([name.index(x) for x in own]) for name, own in zip(names, of, strict=True)]
    flat = index[0][:, None] * said.key_tiles + index[1]
    allowed.view(-1).index_add_(0, flat.flatten(), dense.long().flatten())
    every.view(-1).index_add_(0, flat.flatten(), torch.ones_like(flat).flatten())
    assert said.touched == int((allowed > 0).sum()) and said.full == int((allowed == every).sum())
    assert said.most == int((allowed > 0).sum(1).max())
    assert said.entries == int(dense.sum()) and said.tile_entries == int(every[allowed > 0].sum())
    assert said.all_entries == p.extent**2


def test_a_ring_of_as_many_keys_as_a_causal_window_spans_is_enough() -> None:
    """Decoding token by token needs the last (window − 1) · dilation + 1 keys, and no fewer."""
    for window, dilation in ((1, 1), (4, 1), (3, 2), (4, 5)):
        n, ring = 24, (window - 1) * dilation + 1
        p = neighborhood(n, window, dilation=dilation, causal=True)
        back = [q - k for q in range(n) for k in sees(p, q, n)]
        assert max(back) == ring - 1 and min(back) == 0
        q, k, v = torch.randn(3, 1, 2, n, 4, dtype=torch.float64)
        for at in (0, 5, n - 1):
            held = torch.arange(max(0, at - ring + 1), at + 1)
            step = attend(
                q[:, :, [at]],
                k[:, :, held],
                v[:, :, held],
                pattern=p,
                q_positions=torch.tensor([[at]]),
                kv_positions=held[None],
            )
            torch.testing.assert_close(step, attend(q, k, v, pattern=p)[:, :, [at]], rtol=0, atol=1e-12)


def test_text_beside_the_grid_is_a_second_attention_merged_in() -> None:
    """Grid queries: the window, and dense attention over the text, merged by log-sum-exp. Text queries: everything."""
    before, after = 3, 2
    p = neighborhood((4, 6), (3, 4), stride=(1, 2), before=before, after=after)
    n = p.extent
    q, k, v = torch.randn(3, 1, 2, n, 4, dtype=torch.float64)
    grid = torch.arange(before, n - after)
    text = torch.tensor([i for i in range(n) if i not in grid])
    alone = neighborhood((4, 6), (3, 4), stride=(1, 2))
    parts = [
        attend(q[:, :, grid], k[:, :, grid], v[:, :, grid], pattern=alone, return_lse=True),
        attend(q[:, :, grid], k[:, :, text], v[:, :, text], return_lse=True),
    ]
    out = attend(q, k, v, pattern=p)
    torch.testing.assert_close(out[:, :, grid], merge(parts)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(out[:, :, text], attend(q, k, v)[:, :, text], rtol=0, atol=1e-12)


def test_it_combines_with_others_and_by_head() -> None:
    p = causal() & neighborhood((4, 6), (3, 3)) | per_head([neighborhood((4, 6), 1), neighborhood((4, 6), (1, 6))])
    dense = p.dense(24)
    assert dense.shape == (1, 2, 24, 24)
    check_random_ranges(p, dense, 0)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("window", lambda: neighborhood(12, 0)),
        ("window", lambda: neighborhood((4, 6), (3, 3, 3))),
        ("window", lambda: neighborhood(12, 13)),
        ("window", lambda: neighborhood((12, 8), (3, 3), dilation=(1, 3))),
        ("window", lambda: neighborhood((8, 12), (3, 3), dilation=(3, 1), causal=True)),
        ("window", lambda: neighborhood(12, "3")),
        ("stride", lambda: neighborhood(12, 3, stride=4)),
        ("stride", lambda: neighborhood(12, 3, stride=0)),
        ("dilation", lambda: neighborhood(12, 3, dilation=0)),
        ("causal", lambda: neighborhood((4, 6), 3, causal=(True,))),
        ("causal", lambda: neighborhood(12, 3, causal=1)),
        ("causal", lambda: neighborhood(12, 3, causal=None)),
        ("window", lambda: neighborhood(12, 3.0)),
        ("layout", lambda: neighborhood((2, 2, 2, 2), 1)),
        ("layout", lambda: neighborhood((4, 0), 1)),
        ("before", lambda: neighborhood(12, 3, before=-1)),
        ("m", lambda: neighborhood((4, 6), 3).dense(20)),
        ("positions", lambda: neighborhood((4, 6), 3).block_map(25)),
        ("n", lambda: neighborhood((4, 6), 3).bind(23)),
        ("n", lambda: neighborhood((4, 6), 3).cost(23, tile=(2, 2))),
        ("tile", lambda: neighborhood((4, 6), 3).cost(24, tile=2)),
        ("block", lambda: neighborhood((4, 6), 3).cost(24, tile=(2, 2), block=4)),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()


def test_it_prints_what_is_not_as_usual() -> None:
    p = neighborhood((8, 6), (4, 3), (2, 1), before=2)
    assert repr(p) == "Grid(Neighborhood(8, window=4, stride=2) × Neighborhood(6, window=3), before=2)"


def test_cost_by_tiles_refuses_tokens_beside_the_grid() -> None:
    with pytest.raises(UnsupportedError, match="before and after"):
        neighborhood((4, 6), 3, before=2).cost(tile=(2, 2))
    assert neighborhood((4, 6), 3, before=2).cost(block=4).entries == 2 * 26 + 24 * 2 + 24 * 9


def test_long_maps_take_time_of_blocks() -> None:
    """Guarded loosely, since the machine may be busy; measured 0.03 to 0.6 s."""
    for p in (
        neighborhood(131_072, 1000, stride=16, dilation=9),
        neighborhood((256, 512), (31, 31)),
        neighborhood((32, 64, 64), (9, 9, 9), dilation=(3, 7, 7)),
    ):
        start = time.process_time()
        p.block_map(131_072)
        assert time.process_time() - start < 6.0
