"""The one test every pattern must pass: its rule is what it says, and its tile answers are true of its rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.strategies import POSITIONS, PRIMITIVES, Case, by_hand, composition, pooled

import regard.patterns
from regard.patterns import EMPTY, FULL, Pattern
from regard.registry import entries

few = settings(max_examples=25, deadline=None)
KEYS = [entry.key for entry in entries("pattern")]


def ranges(seed: int, last: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` closed ranges of positions in 0..last, of all sizes, one position wide among them."""
    ends = torch.randint(0, last + 1, (2, count), generator=torch.Generator().manual_seed(seed))
    ends[:, 0] = ends[0, 0]
    return ends.amin(0), ends.amax(0)


def check_random_ranges(p: Pattern, dense: torch.Tensor, seed: int) -> None:
    """Tile answers for 24 random ranges in every row and head, against the entries of `dense`."""
    rows, heads, n, m = dense.shape
    (i0, i1), (j0, j1) = ranges(seed, n - 1, 24), ranges(seed + 1, m - 1, 24)
    b, h = torch.arange(rows)[:, None, None], torch.arange(heads)[:, None]
    told = p.tiles(b, h, i0, i1, j0, j1)
    assert told.dtype == torch.uint8
    told = told.expand(rows, heads, 24)
    for t in range(24):
        inside = dense[:, :, i0[t] : i1[t] + 1, j0[t] : j1[t] + 1].flatten(2)
        check(p, told[:, :, t], inside.any(-1), inside.all(-1))


def check(p: Pattern, told: torch.Tensor, some: torch.Tensor, every: torch.Tensor) -> None:
    assert not ((told == EMPTY) & some).any()
    assert not ((told == FULL) & ~every).any()
    if p.exact:
        assert torch.equal(told.int(), some.int() + every.int())


@pytest.mark.parametrize("key", KEYS)
def test_registered_example(key: str) -> None:
    """Any registered pattern, also one this file has never heard of."""
    (entry,) = (e for e in entries("pattern") if e.key == key)
    assert entry.example is not None, "register(..., example=...) gives the tests a pattern to try"
    p = entry.example()
    n = min(24, p.extent or 24)
    dense = p.dense(n)
    for seed in range(3):
        check_random_ranges(p, dense, seed)
    for block in ((1, 1), (5, 3), (64, 64)):
        assert torch.equal(p.block_map(n, block=block, refine=True).expand(), pooled(dense, block))
    future = dense.triu(1).any()
    assert not (entry.settings["causal"] and future)
    assert getattr(regard.patterns, key.replace("-", "_")) is entry.factory


@pytest.mark.parametrize("key", PRIMITIVES)
@few
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_primitive(key: str, data: st.DataObject, seed: int) -> None:
    case: Case = data.draw(PRIMITIVES[key])
    n = data.draw(st.integers(1, POSITIONS))
    dense = by_hand(case, n, n, 0)
    assert torch.equal(case[0].dense(n), dense)
    check_random_ranges(case[0], dense, seed)


@pytest.mark.parametrize("key", [k for k in PRIMITIVES if k not in ("documents", "per-head")])
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_primitives_are_exact(key: str, data: st.DataObject) -> None:
    assert data.draw(PRIMITIVES[key])[0].exact


def test_documents_say_when_they_are_exact() -> None:
    documents = regard.patterns.documents
    assert documents(torch.tensor([5, 5, 2, 2, -1, 2, 9])).exact
    interrupted = documents(torch.tensor([0, 1, 0, 1, 2, 2]))
    assert not interrupted.exact
    assert not documents(torch.tensor([[0, 0, 1], [0, 1, 0]])).exact
    hole = documents(torch.tensor([0, -1, -1, 0]))  # the two in the middle see nothing, not even one another
    assert hole.exact and hole.block_map(4, block=1).kinds[0, 0, 1].tolist() == [0, 0, 0, 0]
    # FULL stays exact; an EMPTY that is missed is found by refine
    assert interrupted.block_map(6, block=2).kinds[0, 0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 2]]
    missed = documents(torch.tensor([0, 2, 1, 0, 2, 1])).block_map(6, block=1)
    assert (missed.kinds == 1).any()
    refined = documents(torch.tensor([0, 2, 1, 0, 2, 1])).block_map(6, block=1, refine=True)
    assert refined.kinds[0, 0].tolist()[0] == [2, 0, 0, 2, 0, 0]


@settings(max_examples=60, deadline=None)
@given(case=composition, seed=st.integers(0, 10**6), n=st.integers(1, 30))
def test_composition(case: Case, seed: int, n: int) -> None:
    dense = by_hand(case, n, n, 0)
    assert torch.equal(case[0].dense(n), dense)
    check_random_ranges(case[0], dense, seed)


def test_a_wrong_tile_answer_is_caught() -> None:
    """The check above can fail."""

    class Wrong(type(regard.patterns.causal())):
        def tiles(self, b, h, i0, i1, j0, j1):  # type: ignore[no-untyped-def]
            return super().tiles(b, h, i0, i1, j0 + 1, j1)

    wrong = Wrong()
    with pytest.raises(AssertionError):
        check_random_ranges(wrong, wrong.dense(12), 0)
