"""Structure, composition, binding, and what is refused."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from tests.patterns.strategies import Case, composition

import regard.patterns
from regard.errors import ArgumentError
from regard.patterns import (
    Pattern,
    attention_sink,
    causal,
    dilated_window,
    documents,
    full,
    per_head,
    prefix,
    segments,
    sliding_window,
)


def test_equality_hash_and_repr_are_of_structure() -> None:
    a, b = documents(torch.arange(5)), documents(torch.zeros(9, dtype=torch.int32))
    assert a == b and hash(a) == hash(b) and repr(a) == repr(b)
    assert causal() & a == causal() & b and hash(causal() & a) == hash(causal() & b)
    assert a != documents(torch.zeros(2, 5, dtype=torch.long))  # indexed differently, so compiled differently
    assert sliding_window(3) == sliding_window(3) != sliding_window(4)
    assert attention_sink(3) != prefix(3)
    assert causal() & full() != causal() | full()
    assert len({per_head([a, causal()]), per_head([b, causal()]), per_head([causal(), b])}) == 2


def test_repr_is_the_formula() -> None:
    p = causal() & (sliding_window(8) | ~attention_sink(2))
    assert repr(p) == "Causal() & (SlidingWindow(size=8, right=0) | ~AttentionSink(size=2))"
    assert repr(~(causal() & full())) == "~(Causal() & Full())"


@settings(max_examples=25, deadline=None)
@given(x=composition, y=composition)
def test_de_morgan(x: Case, y: Case) -> None:
    a, b = x[0], y[0]
    assert torch.equal((~(a & b)).dense(20), (~a | ~b).dense(20))
    assert torch.equal((~(a | b)).block_map(20, block=3).expand(), (~a & ~b).block_map(20, block=3).expand())
    assert torch.equal((~~a).block_map(20, block=3).expand(), a.block_map(20, block=3).expand())


def test_rows_heads_and_extent() -> None:
    ids = torch.arange(12).view(2, 6)
    p = causal() & documents(ids) & per_head([full(), sliding_window(2), full()])
    assert (p.rows, p.heads, p.extent, p.batched) == (2, 3, 6, True)
    assert p.dense(6).shape == (2, 3, 6, 6)
    assert (causal().rows, causal().heads, causal().extent, causal().batched) == (None, None, None, False)
    assert (segments([3]) | segments([5])).extent == 3


def test_for_head() -> None:
    p = causal() & ~per_head([full(), sliding_window(2)])
    assert p.for_head(1) == causal() & ~sliding_window(2) and p.for_head(1).heads is None
    assert torch.equal(p.dense(5)[:, 1:], p.for_head(1).dense(5))
    assert causal().for_head(7) == causal()
    nested = per_head([per_head([causal(), full()]), per_head([full(), causal()])])
    assert nested == per_head([causal(), causal()])
    with pytest.raises(ArgumentError, match=r"h: got 2; allowed: a query head from 0 to 1"):
        p.for_head(2)


def test_bind() -> None:
    p = causal() & documents(torch.zeros(8, dtype=torch.long))
    assert p.bind(8) is p
    with pytest.raises(ArgumentError, match="n: got 9; allowed: at most 8"):
        (~p | full()).bind(9)
    with pytest.raises(ArgumentError, match="n: got 0"):
        causal().bind(0)


def test_bind_reaches_every_part() -> None:
    """A pattern that does depend on the length, wherever it stands."""

    class Last(type(full())):
        def bind(self, n: int) -> Pattern:
            return sliding_window(n)

    assert (~Last() & per_head([Last(), causal()])).bind(5) == ~sliding_window(5) & per_head(
        [sliding_window(5), causal()]
    )


def test_tensors_move_together() -> None:
    ids = torch.zeros(4, dtype=torch.long)
    p = per_head([documents(ids), causal() & documents(ids), documents(ids + 1)])
    assert all(t.dtype == torch.long for t in p.tensors()) and len(p.tensors()) == 3
    moved = p.to("meta")
    assert moved == p and all(t.device.type == "meta" for t in moved.tensors())
    assert len({id(t) for t in moved.tensors()}) == 2  # what was one tensor still is
    assert p.to("cpu") is p and causal().to("meta") == causal()


def test_rule_beyond_the_ids_sees_nothing() -> None:
    """Positions of padding are undefined; they must not read outside the table, nor see each other."""
    i = torch.tensor([-1, 0, 4, 99])
    zero = torch.zeros((), dtype=torch.long)
    seen = documents(torch.zeros(5, dtype=torch.long)).rule(zero, zero, i[:, None], i)
    assert seen.tolist() == [[False] * 4, [False, True, True, False], [False, True, True, False], [False] * 4]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: sliding_window(0), "size: got 0; allowed: an int ≥ 1"),
        (lambda: sliding_window(-3), "size: got -3"),
        (lambda: sliding_window(2.0), "size: got 2.0"),
        (lambda: sliding_window(True), "size: got True"),
        (lambda: sliding_window(4, right=-1), "right: got -1; allowed: an int ≥ 0"),
        (lambda: dilated_window(0, 2), "size: got 0"),
        (lambda: dilated_window(3, 0), "dilation: got 0; allowed: an int ≥ 1"),
        (lambda: attention_sink(-1), "size: got -1"),
        (lambda: prefix(0), "length: got 0"),
        (lambda: per_head([]), "patterns: got .*at least one Pattern"),
        (lambda: per_head([causal(), "causal"]), "patterns: got .*at least one Pattern"),
        (lambda: per_head([causal(), per_head([causal()])]), "patterns: got a pattern for 1 heads among 2"),
        (lambda: per_head([causal()]) & per_head([causal(), full()]), "heads: got patterns for 1 and 2 heads"),
        (lambda: documents([0, 1]), "ids: got list; allowed: an integer tensor"),
        (lambda: documents(torch.zeros(3)), "ids: got dtype torch.float32"),
        (lambda: documents(torch.ones(3, dtype=torch.bool)), "ids: got dtype torch.bool"),
        (lambda: documents(torch.zeros(1, 2, 3, dtype=torch.long)), r"ids: got shape \(1, 2, 3\)"),
        (lambda: documents(torch.zeros(0, dtype=torch.long)), r"ids: got shape \(0,\)"),
        (lambda: documents(torch.tensor([0, -2])), "ids: got an id of -2"),
        (
            lambda: documents(torch.zeros(2, 3).long()) | documents(torch.zeros(3, 3).long()),
            "rows: got patterns for 2 and 3",
        ),
        (lambda: segments([]), "lengths: got"),
        (lambda: segments([3, 0]), "lengths: got 0"),
        (lambda: segments([3]).dense(4), "positions: got 4; allowed: at most 3"),
        (lambda: segments([3]).block_map(1, 3, q_offset=3), "positions: got 4"),
        (lambda: per_head([causal()] * 2).block_map(4, heads=3), "heads: got 3; allowed: 2"),
        (lambda: documents(torch.zeros(2, 3).long()).dense(3, batch=4), "batch: got 4; allowed: 2"),
        (lambda: causal().dense(0), "n: got 0; allowed: an int ≥ 1"),
        (lambda: causal().block_map(4, block=0), "block: got 0"),
        (lambda: causal().block_map(4, block=(2, 2, 2)), "block: got"),
        (lambda: causal().dense(4, q_offset=-1), "q_offset: got -1"),
        (lambda: causal().cost(4, head_dim=0), "head_dim: got 0"),
    ],
)
def test_bad_input(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()


def test_only_patterns_combine() -> None:
    with pytest.raises(TypeError):
        causal() & 3  # type: ignore[operator]


def test_names_come_from_the_registry() -> None:
    assert "sliding_window" in dir(regard.patterns) and not hasattr(regard.patterns, "slidng_window")
    with pytest.raises(AttributeError, match=r"patterns: .*sliding_window"):
        regard.patterns.slidng_window  # noqa: B018


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(regard.patterns.__path__)])
def test_worked_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"regard.patterns.{name}")).failed == 0
