"""Random patterns, each beside an independent definition: a Python predicate over (row, head, query, key)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from hypothesis import strategies as st

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

POSITIONS = 40  # what ids cover; n, m and offsets stay below
Predicate = Callable[[int, int, int, int], bool]
Case = tuple[Pattern, Predicate]


def _window(size: int, right: int) -> Case:
    seen = set(range(-right, size))
    return sliding_window(size, right=right), lambda b, h, i, j: i - j in seen


def _dilated(size: int, dilation: int) -> Case:
    taps = {dilation * tap for tap in range(size)}
    return dilated_window(size, dilation), lambda b, h, i, j: i - j in taps


def _sink(size: int) -> Case:
    return attention_sink(size), lambda b, h, i, j: j in range(size)


def _prefix(length: int) -> Case:
    return prefix(length), lambda b, h, i, j: j in range(length)


def _documents(rows: list[list[int]]) -> Case:
    ids = torch.tensor(rows if len(rows) > 1 else rows[0], dtype=torch.int32)
    return documents(ids), lambda b, h, i, j: rows[b % len(rows)][i] == rows[b % len(rows)][j] != -1


def _segments(cuts: set[int]) -> Case:
    edges = sorted({0, POSITIONS, *cuts})
    lengths = [b - a for a, b in pairwise(edges)]
    return segments(lengths), lambda b, h, i, j: not any(min(i, j) < e <= max(i, j) for e in edges)


def _of_heads(cases: list[Case]) -> Case:
    return per_head([p for p, _ in cases]), lambda b, h, i, j: cases[h][1](b, h, i, j)


ids = st.lists(st.integers(-1, 4), min_size=POSITIONS, max_size=POSITIONS)
sorted_ids = ids.map(sorted)
runs = st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 12)), min_size=1, max_size=8).map(
    lambda pairs: ([x for x, times in pairs for _ in range(times)] + [7] * POSITIONS)[:POSITIONS]
)
holes = st.sets(st.integers(0, POSITIONS - 1), max_size=POSITIONS // 2)
punched = st.builds(lambda row, gone: [-1 if x in gone else d for x, d in enumerate(row)], sorted_ids, holes)
packed = st.one_of(ids, sorted_ids, runs, punched)
size = st.integers(1, 12)

PRIMITIVES: dict[str, st.SearchStrategy[Case]] = {
    "full": st.just((full(), lambda b, h, i, j: True)),
    "causal": st.just((causal(), lambda b, h, i, j: i >= j)),
    "sliding-window": st.builds(_window, size, st.integers(0, 5)),
    "dilated-window": st.builds(_dilated, size, st.integers(1, 7)),
    "attention-sink": st.builds(_sink, size),
    "prefix": st.builds(_prefix, size),
    "documents": st.one_of(
        packed.map(lambda row: _documents([row])), st.tuples(packed, packed).map(lambda rows: _documents(list(rows)))
    ),
    "segments": st.builds(_segments, st.sets(st.integers(1, POSITIONS - 1), max_size=6)),
}
simple = st.one_of(*PRIMITIVES.values())
PRIMITIVES["per-head"] = st.lists(simple, min_size=3, max_size=3).map(_of_heads)


def _and(x: Case, y: Case) -> Case:
    return x[0] & y[0], lambda *at: x[1](*at) and y[1](*at)


def _or(x: Case, y: Case) -> Case:
    return x[0] | y[0], lambda *at: x[1](*at) or y[1](*at)


def _not(x: Case) -> Case:
    return ~x[0], lambda *at: not x[1](*at)


def _grow(inner: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    return st.one_of(st.builds(_and, inner, inner), st.builds(_or, inner, inner), st.builds(_not, inner))


primitive = st.one_of(*PRIMITIVES.values())
composition = st.recursive(primitive, _grow, max_leaves=4)


def by_hand(case: Case, n: int, m: int, q_offset: int) -> torch.Tensor:
    """bool (rows or 1, heads or 1, n, m), by Python loops over the predicate."""
    p, allowed = case
    return torch.tensor(
        [
            [
                [[allowed(b, h, i, j) for j in range(m)] for i in range(q_offset, q_offset + n)]
                for h in range(p.heads or 1)
            ]
            for b in range(p.rows or 1)
        ]
    )


def pooled(dense: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """uint8 (..., nq, nk): the exact answer of every tile, by looking at all its entries."""
    strips = [s.split(block[1], -1) for s in dense.split(block[0], -2)]
    kinds = [[t.any(-1).any(-1).int() + t.all(-1).all(-1).int() for t in strip] for strip in strips]
    return torch.stack([torch.stack(row, -1) for row in kinds], -2).to(torch.uint8)
