"""What a slip of the hand meets: named errors, and nothing silently different."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from regard import attend, attend_tiled
from regard.errors import ArgumentError
from regard.patterns import (
    Pattern,
    attention_sink,
    causal,
    dilated_window,
    documents,
    enerverse,
    faster_neighborhood_attention,
    m_var,
    neighborhood,
    per_head,
    power_attention,
    prefix,
    radial_attention,
    segments,
    sliding_window,
    tokens,
)
from regard.patterns.checks import MOST
from regard.patterns.cuts import crosses
from regard.patterns.permutation import Tiling, best_tile, permuted
from regard.patterns.powers import receptive_field
from regard.patterns.sharded import drops_for_good

GRID = neighborhood((4, 4), 3)
Q = torch.randn(1, 2, 15, 4)


@pytest.mark.parametrize(
    "make",
    [sliding_window, prefix, attention_sink, lambda n: sliding_window(8, right=n), lambda n: dilated_window(2, n)],
)
@pytest.mark.parametrize("size", [MOST + 1, 1 << 31, (1 << 63) - 1, 1 << 70])
def test_sizes_that_tiles_cannot_count_are_refused(make: Callable[[int], Pattern], size: int) -> None:
    with pytest.raises(ArgumentError, match=f"an int from [01] to {MOST}"):
        make(size)


@pytest.mark.parametrize(
    "pattern",
    [
        sliding_window(MOST),
        sliding_window(8, right=MOST),
        prefix(MOST),
        attention_sink(MOST) & causal(),
        dilated_window(3, MOST // 3),
        power_attention(1, MOST),
    ],
    ids=repr,
)
def test_the_largest_sizes_are_right(pattern: Pattern) -> None:
    n, entries = 300, int(pattern.dense(300).sum())
    cost = pattern.cost(n, block=64)
    assert cost.entries == entries
    kinds = pattern.block_map(n, block=64).expand()[0, 0].repeat_interleave(64, 0).repeat_interleave(64, 1)[:n, :n]
    seen = pattern.dense(n)[0, 0]
    assert not seen[kinds == 0].any() and seen[kinds == 2].all()


@pytest.mark.parametrize(
    "pattern", [GRID, ~GRID, GRID | causal(), per_head([GRID, GRID]), radial_attention(8, 2)], ids=repr
)
def test_a_layout_of_another_length_is_refused(pattern: Pattern) -> None:
    q = Q[:, :, :8]
    for ask in (lambda: attend(q, q, q, pattern=pattern), lambda: pattern.dense(8), lambda: pattern.cost(8)):
        with pytest.raises(ArgumentError, match=r"laid out for 16|allowed: 16, the tokens of the layout"):
            ask()


@pytest.mark.parametrize(
    "growing",
    [
        GRID & causal(),
        GRID & sliding_window(4),
        GRID & per_head([causal(), causal()]),
        faster_neighborhood_attention((4, 4), 3, causal=True) & causal(),
        per_head([GRID & causal(), causal()]),
    ],
    ids=repr,
)
def test_a_layout_grows_where_no_query_sees_what_is_to_come(growing: Pattern) -> None:
    q = torch.randn(1, 2, 16, 4)
    whole = attend(q, q, q, pattern=growing)
    for n in (1, 7, 15):
        torch.testing.assert_close(attend(*(q[:, :, :n],) * 3, pattern=growing), whole[:, :, :n])


def test_a_causal_axis_grows_by_whole_rows() -> None:
    rows = faster_neighborhood_attention((4, 4), 3, causal=(True, False))
    q = torch.randn(1, 2, 16, 4)
    torch.testing.assert_close(attend(*(q[:, :, :8],) * 3, pattern=rows), attend(q, q, q, pattern=rows)[:, :, :8])
    with pytest.raises(ArgumentError, match="laid out for 16"):
        attend(*(q[:, :, :9],) * 3, pattern=rows)


def test_other_layouts_and_given_positions() -> None:
    places = torch.arange(15)[None]
    attend(Q, Q, Q, pattern=GRID, q_positions=places, kv_positions=places)
    for across in (True, False):
        m_var((1, 2, 3), across=across).dense(5)
        with pytest.raises(ArgumentError, match="14, the tokens of the layout"):
            m_var((1, 2, 3), across=across).dense(3)


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"heads": -2}, "heads"),
        ({"heads": 0}, "heads"),
        ({"batch": 2.5}, "batch"),
        ({"head_dim": 0}, "head_dim"),
        ({"tile": None, "key_tile": (2, 2)}, "key_tile"),
    ],
)
def test_cost_by_tiles_checks_what_it_is_given(given: dict, argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        GRID.cost(**{"tile": (2, 2), **given})  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="foo"):
        GRID.cost(tile=(2, 2), foo=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("make", [tokens, lambda f: documents(f.long()), lambda f: enerverse(3, 2, memory=f)])
def test_ids_changed_in_place_are_noticed(make: Callable[[torch.Tensor], Pattern]) -> None:
    pattern = make(torch.tensor([True, False, False]))
    n = pattern.extent
    assert n is not None
    before = pattern.dense(n)
    for again in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert torch.equal(again.dense(n), before)
    given = pattern.tensors()[0]
    given.copy_(given.clone())  # written, but the same
    assert torch.equal(pattern.dense(n), before)
    given.copy_(given.flip(0))
    for ask in (lambda: pattern.dense(n), lambda: (pattern & causal()).block_map(n)):
        with pytest.raises(ArgumentError, match="changed in place"):
            ask()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: crosses(documents(torch.zeros(4).long()), 8, 5), "n"),
        (lambda: crosses(causal(), "x", 1), "n"),
        (lambda: receptive_field(causal(), 4), "layers"),
        (lambda: receptive_field([causal(), 3], 4), "layers"),
        (lambda: receptive_field([causal()], 4, 1.5), "query"),
        (lambda: drops_for_good(causal(), "x", 1), "n"),
        (lambda: segments(3), "lengths"),
        (lambda: per_head(causal()), "patterns"),
        (lambda: causal().dense(True), "n"),
        (lambda: causal().block_map(8, block=True), "block"),
        (lambda: causal().block_map(8, refine="no"), "refine"),
        (lambda: causal().dense(4, q_offset=True), "q_offset"),
        (lambda: causal().for_head(-1), "h"),
        (lambda: causal().show(8, row="x"), "row"),
        (lambda: permuted("x", Tiling((4, 4), (2, 2))), "pattern"),
        (lambda: permuted(causal(), None), "tiling"),
        (lambda: best_tile("x"), "pattern"),
        (lambda: attend_tiled(Q, Q, Q, pattern=None), "pattern"),
        (lambda: attend_tiled(Q, Q, Q, pattern=GRID, tiling=(2, 2)), "tiling"),
        (lambda: attend(Q, Q, Q, scale="x"), "scale"),
        (lambda: attend(Q, Q, Q, scale=True), "scale"),
        (lambda: attend(Q, Q, Q, scale=torch.ones(2)), "scale"),
        (lambda: attend(Q, Q, Q, softcap="x"), "softcap"),
        (lambda: attend(Q, Q, Q, score=3), "score"),
        (lambda: attend(*(Q.to(torch.float8_e5m2),) * 3), "q"),
        (lambda: attend(Q, Q, Q, pattern=type(causal())), "pattern"),
    ],
)
def test_slips_are_named(call: Callable[[], object], argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()
