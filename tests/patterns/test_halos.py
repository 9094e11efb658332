"""HaloNet's pattern: worked examples, the two ends of its spectrum, the rule by its definition, exact tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.grid_cases import by_axes, layouts, sees
from tests.patterns.test_pattern_tiles import check_random_ranges

from regard.errors import ArgumentError
from regard.patterns import full, halonet, sliding_window


def test_worked_examples() -> None:
    p = halonet(12, 4, 1)
    assert [sees(p, q, 12) for q in (0, 5, 11)] == [list(range(5)), list(range(3, 9)), list(range(7, 12))]
    image = halonet((6, 6), 2, 1)
    assert sees(image, 14, 36) == [7, 8, 9, 10, 13, 14, 15, 16, 19, 20, 21, 22, 25, 26, 27, 28]
    assert int(image.dense(36).sum()) == 400 == image.cost(tile=(2, 2)).entries


def test_the_ends_of_the_spectrum() -> None:
    assert torch.equal(halonet(20, 1, 3).dense(20), sliding_window(4, right=3).dense(20))
    blocks = torch.arange(20) // 5
    assert torch.equal(halonet(20, 5, 0).dense(20)[0, 0], blocks[:, None] == blocks)
    assert torch.equal(halonet((4, 5), 2, 5).dense(20), full().dense(20))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), layout=layouts(), seed=st.integers(0, 10**6))
def test_rule_and_tiles(data: st.DataObject, layout: tuple[int, ...], seed: int) -> None:
    block = tuple(data.draw(st.integers(1, size + 1)) for size in layout)
    halo = tuple(data.draw(st.integers(0, size)) for size in layout)
    axes = []
    for size, b, h in zip(layout, block, halo, strict=True):
        cuts = [list(range(start, min(start + b, size))) for start in range(0, size, b)]
        own = {x: cut for cut in cuts for x in cut}
        axes.append([{k for k in range(size) if own[q][0] - h <= k < own[q][0] + b + h} for q in range(size)])
    dense = by_axes(layout, axes)[None, None]
    p = halonet(layout, block, halo)
    assert torch.equal(p.dense(p.extent), dense)
    check_random_ranges(p, dense, seed)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("block", lambda: halonet(12, 0, 1)),
        ("halo", lambda: halonet(12, 2, -1)),
        ("halo", lambda: halonet(12, 2, 1.5)),
        ("halo", lambda: halonet((4, 4), 2, None)),
        ("halo", lambda: halonet((4, 4), 2, (1, 1, 1))),
        ("m", lambda: halonet((4, 4), 2, 1).dense(12)),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()
