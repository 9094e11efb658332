"""M-VAR, EnerVerse, Croc, BICO, SeNER: worked sets and identities of their cards, rules by definition, exact tiles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.grid_cases import sees
from tests.patterns.test_pattern_tiles import check_random_ranges

from regard.attend import attend
from regard.errors import ArgumentError, UnknownNameError
from regard.patterns import bico, causal, croc, documents, enerverse, full, m_var, segments, sener
from regard.scores.log_n import log_n

few = settings(max_examples=30, deadline=None)


# ---- M-VAR --------------------------------------------------------------------------------------------------------


def test_scales() -> None:
    p, var = m_var((1, 2, 3)), m_var((1, 2, 3), across=True)
    assert [sees(p, q, 14) for q in (0, 3, 5)] == [[0], [1, 2, 3, 4], list(range(5, 14))]
    assert [sees(var, q, 14) for q in (3, 5)] == [list(range(5)), list(range(14))]
    assert torch.equal(p.dense(14), segments([1, 4, 9]).dense(14))
    pairs = [m_var(), m_var(across=True), full()]
    assert [x.cost(680).entries for x in pairs] == [110_468, 286_434, 462_400]


@few
@given(sides=st.lists(st.integers(1, 4), min_size=1, max_size=4), across=st.booleans(), seed=st.integers(0, 10**6))
def test_scales_by_definition(sides: list[int], across: bool, seed: int) -> None:
    scale = [k for k, side in enumerate(sides) for _ in range(side * side)]
    dense = torch.tensor([[k == q or (across and k < q) for k in scale] for q in scale])[None, None]
    p = m_var(tuple(sides), across=across)
    assert torch.equal(p.dense(len(scale)), dense)
    check_random_ranges(p, dense, seed)


def test_nothing_passes_between_scales() -> None:
    q, k, v = (torch.randn(1, 1, 14, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    for across, seen in ((False, [False, True, False]), (True, [True, True, False])):
        (grad,) = torch.autograd.grad(attend(q, k, v, pattern=m_var((1, 2, 3), across=across))[:, :, 1:5].sum(), v)
        assert [bool(part.any()) for part in grad.split([1, 4, 9], 2)] == seen


# ---- EnerVerse ----------------------------------------------------------------------------------------------------


def test_chunks_with_memory() -> None:
    p = enerverse(12, 4, [0, 3])
    assert [sees(p, q, 12) for q in (1, 5, 9)] == [[0, 1, 2, 3], [0, 3, 4, 5, 6, 7], [0, 3, 8, 9, 10, 11]]
    chunk = torch.arange(12) // 4
    assert torch.equal(enerverse(12, 4, range(12)).dense(12)[0, 0], chunk[:, None] >= chunk)
    assert torch.equal(enerverse(12, 4).dense(12)[0, 0], chunk[:, None] == chunk)
    assert torch.equal(enerverse(12, 12, [3]).dense(12), full().dense(12))


@few
@given(
    layout=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 2)),
    chunk=st.integers(1, 5),
    layer=st.sampled_from(["joint", "temporal", "spatial", "cross-view"]),
    drawn=st.lists(st.booleans(), min_size=9, max_size=9),
    seed=st.integers(0, 10**6),
)
def test_chunks_by_definition(
    layout: tuple[int, int, int], chunk: int, layer: str, drawn: list[bool], seed: int
) -> None:
    views, frames, tokens = layout
    places = [(v, f, s) for v in range(views) for f in range(frames) for s in range(tokens)]

    def allowed(q: tuple[int, int, int], k: tuple[int, int, int]) -> bool:
        if layer in ("spatial", "cross-view"):
            return q[1] == k[1] and (layer == "cross-view" or q[0] == k[0])
        same = layer == "joint" or (q[0] == k[0] and q[2] == k[2])
        a, c = q[1] // chunk, k[1] // chunk
        return same and (a == c or (drawn[k[1]] and c < a))

    dense = torch.tensor([[allowed(q, k) for k in places] for q in places])[None, None]
    p = enerverse(frames, chunk, torch.tensor(drawn[:frames]), tokens=tokens, views=views, layer=layer)
    assert p.exact and torch.equal(p.dense(len(places)), dense)
    check_random_ranges(p, dense, seed)


def test_views_and_the_future() -> None:
    alone = enerverse(6, 3, tokens=2, layer="cross-view")
    assert torch.equal(alone.dense(12), enerverse(6, 3, tokens=2, layer="spatial").dense(12))
    q, k, v = (torch.randn(1, 1, 12, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    (grad,) = torch.autograd.grad(attend(q, k, v, pattern=enerverse(12, 4, [0, 3, 5]))[:, :, 4:8].sum(), v)
    assert grad[0, 0].any(-1).nonzero()[:, 0].tolist() == [0, 3, 4, 5, 6, 7]
    # permuting the views permutes the outputs
    p = enerverse(2, 2, tokens=2, views=3, layer="cross-view")
    order = torch.tensor([2, 0, 1])

    def swap(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (3, 4))[:, :, order].flatten(2, 3)

    torch.testing.assert_close(
        attend(swap(q), swap(k), swap(v), pattern=p), swap(attend(q, k, v, pattern=p)), rtol=0, atol=1e-12
    )


def test_pairs_of_a_chunk_do_not_grow_with_the_video() -> None:
    for frames in (16, 64):
        p = enerverse(frames, 8, [0, 2, 5, 7])
        assert int(p.dense(8, frames).sum()) == 8 * (8 + 4)


# ---- Croc ---------------------------------------------------------------------------------------------------------


def test_images_see_themselves_whole() -> None:
    ids = torch.tensor([-1] + [0] * 4 + [-1] * 7)
    p = croc(ids)
    assert [sees(p, q, 12) for q in (0, 2, 5, 9)] == [[0], [0, 1, 2, 3, 4], list(range(6)), list(range(10))]


@few
@given(
    lengths=st.lists(st.tuples(st.booleans(), st.integers(1, 6)), min_size=1, max_size=6), seed=st.integers(0, 10**6)
)
def test_images_by_definition(lengths: list[tuple[bool, int]], seed: int) -> None:
    """Neighbouring images touch, so that their borders are not those of text."""
    ids = torch.tensor([x if image else -1 for x, (image, n) in enumerate(lengths) for _ in range(n)])
    rows = torch.stack([ids, ids.flip(0)])
    for given_ids in (ids, rows):
        p, n = croc(given_ids), len(ids)
        dense = (causal() | documents(given_ids)).dense(n)
        assert p.exact and torch.equal(p.dense(n), dense)
        check_random_ranges(p, dense, seed)


# ---- BICO ---------------------------------------------------------------------------------------------------------


def test_masked_tokens_are_not_seen() -> None:
    masked = torch.zeros(6, dtype=torch.bool)
    masked[[2, 4]] = True
    p = bico(masked)
    assert all(sees(p, q, 6) == [0, 1, 3, 5] for q in range(6))
    q, k, v = (torch.randn(2, 2, 6, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    grads = torch.autograd.grad(attend(q, k, v, pattern=p).sin().sum(), (q, k, v))
    assert grads[0][:, :, masked].any() and not grads[1][:, :, masked].any() and not grads[2][:, :, masked].any()
    torch.testing.assert_close(attend(q, k, v, pattern=bico(masked & False)), attend(q, k, v), rtol=0, atol=1e-12)
    assert (attend(q, k, v, pattern=bico(masked | True)) == 0).all()
    rows = torch.stack([masked, ~masked])
    dense = bico(rows).dense(6)
    assert torch.equal(dense, ~rows[:, None, None].expand(2, 1, 6, 6))
    check_random_ranges(bico(rows), dense, 0)


# ---- SeNER --------------------------------------------------------------------------------------------------------


def test_arrow() -> None:
    p = sener(2)
    assert [sees(p, q, 12) for q in (0, 5, 11)] == [list(range(12)), [0, 3, 4, 5, 6, 7], [0, 9, 10, 11]]
    assert torch.equal(sener(12).dense(12), full().dense(12))


@few
@given(window=st.integers(0, 9), first=st.integers(0, 5), n=st.integers(1, 24), seed=st.integers(0, 10**6))
def test_arrow_by_definition(window: int, first: int, n: int, seed: int) -> None:
    dense = torch.tensor(
        [[min(i, j) < first or j in range(i - window, i + window + 1) for j in range(n)] for i in range(n)]
    )
    assert torch.equal(sener(window, first).dense(n)[0, 0], dense)
    check_random_ranges(sener(window, first), dense[None, None], seed)


def test_log_n_sharpens_the_first_queries_alone() -> None:
    n = 20
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for _ in range(3))
    p, plain = sener(3), attend(q, k, v, pattern=sener(3))
    torch.testing.assert_close(attend(q, k, v, pattern=p, score=log_n(n, trained=n)), plain, rtol=0, atol=1e-12)
    scaled = attend(q, k, v, pattern=p, score=log_n(n, trained=5))
    torch.testing.assert_close(scaled[:, :, 1:], plain[:, :, 1:], rtol=0, atol=1e-12)
    sharper = attend(q[:, :, :1], k, v, scale=0.5 * math.log(n) / math.log(5))
    torch.testing.assert_close(scaled[:, :, :1], sharper, rtol=0, atol=1e-12)


# ---- all ----------------------------------------------------------------------------------------------------------


def test_long_maps_are_made_of_tile_answers() -> None:
    n = 131_072
    ids = torch.arange(n) // 576
    sides = (*range(1, 72), 73)
    total = sum(x * x for x in sides)
    for p, m in (
        (m_var(sides), total),
        (enerverse(512, 8, range(0, 512, 50), tokens=256), n),
        (croc(torch.where(ids % 3 == 0, ids, -1)), n),
        (bico(ids % 3 == 0), n),
        (sener(128), n),
    ):
        assert 0 < p.block_map(m).density <= 1


def test_borders_of_scales_are_where_they_should_be() -> None:
    ends = [sum(x * x for x in range(1, k)) for k in range(1, 7)]
    p = m_var(tuple(range(1, 6)))
    for a, b in pairwise(ends):
        assert sees(p, a, 55) == sees(p, b - 1, 55) == list(range(a, b))


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("sides", lambda: m_var(())),
        ("sides", lambda: m_var(3)),
        ("sides", lambda: m_var((1, 0))),
        ("across", lambda: m_var((1, 2), across=1)),
        ("n", lambda: m_var((1, 2)).bind(4)),
        ("chunk", lambda: enerverse(4, 0)),
        ("frames", lambda: enerverse(0)),
        ("memory", lambda: enerverse(4, 2, [4])),
        ("memory", lambda: enerverse(4, 2, 3)),
        ("memory", lambda: enerverse(4, 2, torch.ones(5, dtype=torch.bool))),
        ("images", lambda: croc([0, 1])),
        ("images", lambda: croc(torch.zeros(3))),
        ("images", lambda: croc(torch.tensor([0, -1, 0]))),
        ("images", lambda: croc(torch.tensor([0, -2]))),
        ("images", lambda: croc(torch.zeros(1, 1, 3, dtype=torch.long))),
        ("masked", lambda: bico(torch.zeros(3))),
        ("masked", lambda: bico(torch.zeros(0, dtype=torch.bool))),
        ("positions", lambda: bico(torch.zeros(3, dtype=torch.bool)).dense(4)),
        ("window", lambda: sener(-1)),
        ("first", lambda: sener(1, -1)),
        ("n", lambda: log_n(0)),
        ("trained", lambda: log_n(8, trained=1)),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(UnknownNameError, match="did you mean spatial"):
        enerverse(4, 2, layer="spacial")  # type: ignore[arg-type]
