"""Radial attention: worked sets, counts and growth of the card, both rules by their definitions, exact tiles."""

from __future__ import annotations

import time
from math import ceil, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.patterns.grid_cases import sees, with_others
from tests.patterns.test_pattern_tiles import check_random_ranges

from regard.errors import ArgumentError
from regard.patterns import full, radial_attention
from regard.patterns.radial import radial_blocks


def by_hand(frames: int, s: int, sink: bool) -> torch.Tensor:
    def allowed(i: int, a: int, j: int, c: int) -> bool:
        apart, p = abs(i - j), 1
        while 2 * p <= apart:
            p *= 2
        near = p <= s and (abs(a - c) + 1) * p <= s
        return near or (apart % ceil(p / s) == 0 and a == c) or (sink and j == 0)

    places = [(f, a) for f in range(frames) for a in range(s)]
    return torch.tensor([[allowed(*q, *k) for k in places] for q in places])


def test_worked_sets() -> None:
    bare, sunk = radial_attention(8, 4, sink=False), radial_attention(8, 4)
    row = [2, 5, 6, 7, 9, 10, 11, *range(12, 24), 25, 26, 27, 29, 30, 31]
    assert sees(bare, 18, 32) == row
    assert sees(sunk, 18, 32) == sorted([*row, 0, 1, 3])
    assert sees(sunk, 0, 32) == [*range(10), 12, 13, 16, 20, 24, 28]
    assert sees(sunk, 30, 32) == [0, 1, 2, 3, 6, 10, 14, 17, 18, 19, 21, 22, 23, *range(24, 32)]


@pytest.mark.parametrize(("frames", "s", "pairs"), [(8, 4, 652), (16, 4, 1772), (32, 8, 19648)])
def test_counts(frames: int, s: int, pairs: int) -> None:
    n = frames * s
    dense = radial_attention(frames, s, sink=False).dense(n)[0, 0]
    assert int(dense.sum()) == pairs <= 4 * s * n * (log2(n) - log2(s))
    assert torch.equal(dense, dense.T)
    near = dense.view(frames, s, frames, s)
    assert all(near[i, :, j].all() for i in range(frames) for j in range(frames) if abs(i - j) <= 1)


def test_few_frames_are_dense() -> None:
    for frames in (1, 2):
        assert torch.equal(radial_attention(frames, 5).dense(5 * frames), full().dense(5 * frames))


def test_density_of_a_band() -> None:
    s, frames = 512, 9
    zero, places = torch.zeros((), dtype=torch.long), torch.arange(s)
    p = radial_attention(frames, s, sink=False)
    for apart, k in ((1, 0), (2, 1), (5, 2), (8, 3)):
        share = float(p.rule(zero, zero, places[:, None], apart * s + places).double().mean())
        assert share == pytest.approx(2.0**-k * (2 - 2.0**-k), rel=0.02)


def test_growth() -> None:
    """At s = 64 the slope of log pairs over log N falls towards 1: n log n."""
    s, zero, counts = 64, torch.zeros((), dtype=torch.long), {}
    for frames in (8, 16, 64, 128, 256, 512):
        p = radial_attention(frames, s, sink=False)
        by_distance = [
            int(p.rule(zero, zero, torch.arange(s)[:, None], apart * s + torch.arange(s)).sum())
            for apart in range(frames)
        ]
        counts[frames] = sum(x * (frames - d) * (2 if d else 1) for d, x in enumerate(by_distance))
    slopes = [log2(counts[2 * f] / counts[f]) for f in (8, 64, 256)]
    assert slopes == pytest.approx([1.56, 1.25, 1.15], abs=0.006)


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 40),
    s=st.integers(1, 6),
    sink=st.booleans(),
    beside=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    seed=st.integers(0, 10**6),
)
def test_rule_and_tiles(frames: int, s: int, sink: bool, beside: tuple[int, int], seed: int) -> None:
    if frames * s > 80:
        frames = 80 // s
    p = radial_attention(frames, s, sink=sink, before=beside[0], after=beside[1])
    dense = with_others(by_hand(frames, s, sink), *beside)[None, None]
    assert p.exact and torch.equal(p.dense(p.extent), dense)
    check_random_ranges(p, dense, seed)


def blocks_by_hand(frames: int, s: int, text: int, block: int, decay: float, next_frame: int) -> torch.Tensor:
    """The released procedure: a mask for every pair of frames, its columns counted block by block."""
    video = frames * s
    count = -(-(video + text) // block)
    kept = torch.zeros(count, count, dtype=torch.bool)
    a = torch.arange(s)
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            quotient = 2 ** s.bit_length() / 2 ** d.bit_length()
            width = s if d == 0 else next_frame if d == 1 else max(block, decay * quotient)
            if d > 1 and quotient < block and d % int(block / quotient):
                continue
            mask = torch.zeros(count * block, count * block)
            mask[i * s : (i + 1) * s, j * s : (j + 1) * s] = ((a[:, None] - a).abs() <= width).float()
            columns = mask.view(count, block, count, block).mean(1)
            dense, some = (columns > 1 / 3).sum(-1), (columns > 0).sum(-1)
            kept |= dense / (some + 1e-9) > 0.6
    kept[:, : -(-s // block)] = True
    for x in range(count):
        if (x + 1) * block > video and text:
            kept[x] = True
            kept[:, x] = True
    return kept


@settings(max_examples=10, deadline=None)
@given(
    frames=st.integers(1, 7),
    s=st.integers(1, 28),
    text=st.integers(0, 9),
    block=st.sampled_from([4, 8]),
    decay=st.sampled_from([1.0, 0.5, 0.3]),
    half=st.booleans(),
)
def test_blocks(frames: int, s: int, text: int, block: int, decay: float, half: bool) -> None:
    p = radial_blocks(frames, s, text=text, block=block, decay=decay, next_frame=s // 2 if half else None)
    want = blocks_by_hand(frames, s, text, block, decay, s // 2 if half else s)
    n = frames * s + text
    assert torch.equal(p.block_map(n, block=block).kinds[0, 0] > 0, want)
    assert torch.equal(p.dense(n)[0, 0], want.repeat_interleave(block, 0).repeat_interleave(block, 1)[:n, :n])


def test_long_maps_take_time_of_blocks() -> None:
    """Guarded loosely, since the machine may be busy; measured about half a second each."""
    for make, density in ((radial_attention, 0.4), (radial_blocks, 0.21)):
        start = time.process_time()
        assert make(128, 1024).block_map(131_072).density < density
        assert time.process_time() - start < 6.0


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("frames", lambda: radial_attention(0, 4)),
        ("tokens", lambda: radial_attention(4, 0)),
        ("sink", lambda: radial_attention(4, 4, sink=1)),
        ("m", lambda: radial_attention(4, 4).dense(15)),
        ("decay", lambda: radial_blocks(4, 4, decay=0.0)),
        ("decay", lambda: radial_blocks(4, 4, decay="1")),
        ("block", lambda: radial_blocks(4, 4, block=0)),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()
