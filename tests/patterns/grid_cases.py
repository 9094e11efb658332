"""Patterns on grids by their definitions, in plain Python, one axis and one pair at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from hypothesis import strategies as st

from regard.patterns import Pattern
from regard.patterns.permutation import Tiling

Allowed = Callable[[int, int], bool]


def sees(p: Pattern, i: int, n: int, h: int = 0) -> list[int]:
    """The keys of query i."""
    return p.dense(n)[0, h, i].nonzero()[:, 0].tolist()


def neighborhood_axis(size: int, window: int, stride: int, dilation: int, causal: bool) -> list[set[int]]:
    """The coordinates each q sees: list its residue class, put the window round the group's leader, shift it inward."""
    out = []
    for q in range(size):
        members = list(range(q % dilation, size, dilation))
        place = members.index(q)
        group = [x for x in range(len(members)) if x // stride == place // stride]
        if causal:
            leader = min(place - place % stride + stride - 1, len(members) - 1)
            seen = [x for x in range(len(members)) if leader - window < x <= place]
        else:
            leader = min(place - place % stride + stride // 2, len(members) - 1)
            start = leader - window // 2
            while start + window > len(members):
                start -= 1
            while start < 0:
                start += 1
            seen = list(range(start, start + window))
        assert place in group
        out.append({members[x] for x in seen})
    return out


def by_axes(layout: tuple[int, ...], axes: list[list[set[int]]]) -> torch.Tensor:
    """bool (N, N): a pair is allowed where every axis allows it."""
    places = list(product(*map(range, layout)))
    return torch.tensor(
        [[all(y in axis[x] for axis, x, y in zip(axes, p, q, strict=True)) for q in places] for p in places]
    )


def with_others(dense: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """The same with tokens before and after the grid that see all and are seen by all."""
    n = len(dense)
    out = torch.ones(before + n + after, before + n + after, dtype=torch.bool)
    out[before : before + n, before : before + n] = dense
    return out


def in_tiles(dense: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """bool (length, length): the rule in tile order, listing the slots by loops; empty slots are all False."""
    grid = list(product(*map(range, tiling.layout)))
    slots: list[int | None] = []
    for corner in product(*(range(0, size, t) for size, t in zip(tiling.layout, tiling.tile, strict=True))):
        for offset in product(*map(range, tiling.tile)):
            at = tuple(c + o for c, o in zip(corner, offset, strict=True))
            slots.append(tiling.before + grid.index(at) if at in grid else None)
    slots += list(range(tiling.before)) + [tiling.before + len(grid) + x for x in range(tiling.after)]
    real = torch.tensor([s is not None for s in slots])
    index = torch.tensor([s or 0 for s in slots])
    return dense[index][:, index] & real[:, None] & real


@st.composite
def layouts(draw: st.DrawFn, most: int = 40) -> tuple[int, ...]:
    """One to three sizes, some of them 1, of at most `most` tokens."""
    sizes: list[int] = []
    left = most
    for _ in range(draw(st.integers(1, 3))):
        sizes.append(draw(st.integers(1, min(left, 14))))
        left //= sizes[-1]
    return tuple(sizes)


@st.composite
def neighborhood_settings(draw: st.DrawFn, size: int) -> tuple[int, int, int, bool]:
    """window, stride, dilation, causal that fit an axis."""
    window = draw(st.integers(1, size))
    dilation = draw(st.integers(1, size // window))
    return window, draw(st.integers(1, window)), dilation, draw(st.booleans())
