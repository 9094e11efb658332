"""CLEAR: its worked examples, the count of a disk, the rule by its definition, exact tiles."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.grid_cases import layouts, sees, with_others
from tests.patterns.test_pattern_tiles import check_random_ranges

from regard.attend import attend, merge
from regard.errors import ArgumentError
from regard.patterns import clear, full


def test_worked_examples() -> None:
    p = clear((4, 4), 2, text=2)
    assert sees(p, 7, 18) == [0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12]
    assert sees(p, 2, 18) == [0, 1, 2, 3, 6, 7]
    assert sees(p, 0, 18) == list(range(18))


@pytest.mark.parametrize(("radius", "keys"), [(2, 9), (3, 25), (4, 45), (8, 193), (16, 793), (32, 3205)])
def test_keys_of_a_whole_disk(radius: int, keys: int) -> None:
    side = 2 * radius + 1
    p = clear((side, side), radius, text=5)
    middle = torch.tensor([5 + side * radius + radius])
    zero = torch.zeros(1, dtype=torch.long)
    assert int(p.rule(zero, zero, middle, torch.arange(p.extent)).sum()) == 5 + keys


@pytest.mark.parametrize(("disk", "saved"), [(193, 0.9954), (793, 0.9931)])
def test_pairs_saved_at_8k(disk: int, saved: float) -> None:
    """512 × 512 tokens and 512 of text, counted as in the card: whole disks, text dense."""
    image, text = 512 * 512, 512
    pairs = image * (text + disk) + text * (image + text)
    assert 1 - pairs / (image + text) ** 2 == pytest.approx(saved, abs=3e-4)


@settings(max_examples=40, deadline=None)
@given(layout=layouts(), radius=st.integers(1, 8), text=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_rule_and_tiles(layout: tuple[int, ...], radius: int, text: int, seed: int) -> None:
    places = list(product(*map(range, layout)))
    grid = torch.tensor(
        [[sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) ** 0.5 < radius for q in places] for p in places]
    )
    dense = with_others(grid, text, 0)[None, None]
    p = clear(layout, radius, text=text)
    assert torch.equal(p.dense(p.extent), dense) and torch.equal(dense, dense.mT)
    check_random_ranges(p, dense, seed)


def test_a_large_disk_is_everything() -> None:
    assert torch.equal(clear((3, 4), 4, text=1).dense(13), full().dense(13))  # 16 > 2² + 3²
    assert not clear((3, 4), 3).dense(12).all()


def test_rows_on_two_devices_with_a_halo() -> None:
    """Image queries need `radius` rows of the neighbour; text queries are merged by log-sum-exp. Exactly the whole."""
    height, width, radius, text = 6, 4, 2, 3
    p = clear((height, width), radius, text=text)
    n = p.extent
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for _ in range(3))
    whole = attend(q, k, v, pattern=p)
    tokens = torch.arange(n)
    parts = []
    for rows in (range(3), range(3, 6)):
        own = tokens[text + rows.start * width : text + rows.stop * width]
        first, last = max(0, rows.start - radius), min(height, rows.stop + radius)
        near = torch.cat([tokens[:text], tokens[text + first * width : text + last * width]])
        here = attend(
            q[:, :, own], k[:, :, near], v[:, :, near], pattern=p, q_positions=own[None], kv_positions=near[None]
        )
        torch.testing.assert_close(here, whole[:, :, own], rtol=0, atol=1e-12)
        keys = own if rows.start else torch.cat([tokens[:text], own])
        parts.append(attend(q[:, :, :text], k[:, :, keys], v[:, :, keys], return_lse=True))
    torch.testing.assert_close(merge(parts)[0], whole[:, :, :text], rtol=0, atol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r"^radius: got 0"):
        clear((4, 4), 0)
    with pytest.raises(ArgumentError, match=r"^text: got -1"):
        clear((4, 4), 2, text=-1)
    with pytest.raises(ArgumentError, match=r"^m: got 15; allowed: 16, the tokens of the layout: 4 × 4"):
        clear((4, 4), 2).dense(15)
