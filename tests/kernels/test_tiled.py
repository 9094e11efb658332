"""FlashAttention: the tiled algorithm is dense attention, and moves as little as its paper says."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from regard.attend import attend, merge
from regard.errors import ArgumentError
from regard.kernels.reference.tiled import Online, tiled_attention
from regard.kernels.traffic import dense_traffic, flash_blocks, flash_traffic
from regard.patterns import Pattern, causal, flashattention, per_head, sliding_window, tokens
from regard.patterns.block_layouts import butterfly_layout

FEW = per_head([causal(), sliding_window(3), causal() & tokens(torch.arange(40) > 4), sliding_window(2, right=2)])
PATTERNS: list[Pattern | None] = [
    None,
    causal(),
    causal() & sliding_window(5),
    FEW,
    flashattention(butterfly_layout(4), 4),
]


def inputs(n: int, m: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, 4, n, 6, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, 2, m, d, dtype=dtype, requires_grad=True) for d in (6, 3))
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern | None) -> tuple[Tensor, Tensor]:
    """softmax over the whole map, zeros for queries that see nothing."""
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = q @ k.mT / q.shape[3] ** 0.5
    if pattern is not None:
        logits = logits.masked_fill(~pattern.dense(q.shape[2], k.shape[2]), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return weights @ v, lse


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("block", [(4, 4), (3, 5), (64, 2)])
def test_tiles_are_dense_forward_and_backward(pattern: Pattern | None, block: tuple[int, int]) -> None:
    for n, m in ((13, 13), (5, 14)):
        q, k, v = inputs(n, m)
        out, lse = tiled_attention(q, k, v, pattern=pattern, block=block)
        want, want_lse = dense(q, k, v, pattern)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
        weight = torch.randn_like(out)
        got = torch.autograd.grad((out * weight).sum(), (q, k, v))
        for a, b in zip(got, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck_and_blind_queries() -> None:
    pattern = sliding_window(3) & tokens(torch.arange(9) > 3)  # queries 0 to 3 see nothing
    q, k, v = inputs(9, 9)
    assert torch.autograd.gradcheck(
        lambda *x: tiled_attention(*x, pattern=pattern, block=(4, 2))[0], (q, k, v), fast_mode=True
    )
    out, lse = tiled_attention(q, k, v, pattern=pattern, block=(2, 2))
    assert (out[:, :, :4] == 0).all() and (lse[:, :, :4] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, :4] == 0).all()


def test_the_order_of_key_blocks_does_not_matter() -> None:
    q, k, v = inputs(12, 12)
    want = tiled_attention(q, k, v, pattern=causal(), block=(4, 3))
    for order in ([3, 2, 1, 0], [2, 0, 3, 1]):
        for a, b in zip(tiled_attention(q, k, v, pattern=causal(), block=(4, 3), order=order), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_block_sparse_is_the_layout_expanded_and_agrees_with_attend() -> None:
    layout = torch.rand(4, 4) < 0.6
    p = flashattention(layout, 4)
    q, k, v = inputs(16, 16)
    mask = layout.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(p.dense(16)[0, 0], mask)
    for block in ((4, 4), (2, 8), (8, 2)):
        torch.testing.assert_close(tiled_attention(q, k, v, pattern=p, block=block)[0], attend(q, k, v, pattern=p))


def test_worked_example() -> None:
    scores, v = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).double(), torch.eye(4, dtype=torch.float64)
    state = Online.empty(torch.zeros(1, 1, dtype=torch.float64), 4).absorb(scores[:, :2], v[:2])
    assert (state.m.item(), round(state.l.item(), 7)) == (3.0, 1.1353353)
    state = state.absorb(scores[:, 2:], v[2:])
    assert (state.m.item(), round(state.l.item(), 7)) == (3.0, round(1 + math.exp(-2) + math.exp(-1) + math.exp(-3), 7))
    out, lse = state.result()
    assert round(state.l.item(), 7) == 1.5530018 and round(lse.item(), 7) == 3.4401897
    torch.testing.assert_close(out, scores.softmax(-1))


def test_stable_for_large_logits() -> None:
    state = Online.empty(torch.zeros(1, 1, dtype=torch.float64), 2)
    logits, v = torch.tensor([[0.0, 1.0, 2.0]]).double(), torch.randn(3, 2, dtype=torch.float64)
    plain, shifted = (state.absorb(x, v).result()[0] for x in (logits, logits + 1e4))
    torch.testing.assert_close(plain, shifted, rtol=0, atol=1e-11)
    q, k, v = (x.detach().half() * 20 for x in inputs(9, 9, torch.float32))
    out, lse = tiled_attention(q, k, v, block=(4, 4), scale=1.0)
    assert float((q.float() @ k.float().mT.repeat_interleave(2, 1)).abs().max()) > 1e3
    assert out.dtype == torch.float16 and out.isfinite().all() and lse.dtype == torch.float32 and lse.isfinite().all()


@pytest.mark.parametrize("cut", [0, 1, 5, 8, 9])
def test_two_sets_of_keys_merge(cut: int) -> None:
    q, k, v = inputs(3, 9)
    want = tiled_attention(q, k, v, block=(2, 4))
    parts = [tiled_attention(q, k[:, :, keys], v[:, :, keys], block=(2, 4)) for keys in (slice(0, cut), slice(cut, 9))]
    for got, all_at_once in zip(merge(parts), want, strict=True):
        torch.testing.assert_close(got, all_at_once, rtol=0, atol=1e-12)


def test_the_counted_traffic_follows_both_laws() -> None:
    d, sram = 64, 24_576
    for n in (2048, 4096):
        assert 3.5 < dense_traffic(2 * n, head_dim=d) / dense_traffic(n, head_dim=d) <= 4
        moved = [flash_traffic(n, head_dim=d, sram=s) for s in (sram, 2 * sram, 4 * sram)]
        for more, less in pairwise(moved):
            assert 1.5 < more / less <= 2, "twice the fast memory, half the traffic"
        law = n * n * d * d / sram
        assert 1 < moved[0] / law < 16 and moved[0] < dense_traffic(n, head_dim=d) * 4
        assert 3.5 < flash_traffic(2 * n, head_dim=d, sram=sram) / moved[0] < 4.2
    assert flash_traffic(4096, head_dim=64, sram=196_608) < dense_traffic(4096, head_dim=64) / 3


@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.125])
def test_the_counted_traffic_of_a_block_sparse_layout_is_its_share(share: float) -> None:
    d, sram, n = 64, 24_576, 4096
    rows, columns = flash_blocks(d, sram)
    layout = torch.zeros(-(-n // rows), -(-n // columns), dtype=torch.bool)
    layout.view(-1)[torch.randperm(layout.numel())[: int(share * layout.numel())]] = True
    p = flashattention(layout, (rows, columns))
    ratio = flash_traffic(n, head_dim=d, sram=sram, pattern=p) / flash_traffic(n, head_dim=d, sram=sram)
    assert share <= ratio < share + 0.1


def test_bad_input_is_named() -> None:
    q, k, v = inputs(4, 4)
    with pytest.raises(ArgumentError, match=r"block: got \(0, 4\)"):
        tiled_attention(q, k, v, block=(0, 4))
    with pytest.raises(ArgumentError, match="order: got"):
        tiled_attention(q, k, v, block=(2, 2), order=[0, 0])
    with pytest.raises(ArgumentError, match="q: got 4 queries"):
        tiled_attention(q, k[:, :, :2], v[:, :, :2], pattern=causal())
    with pytest.raises(ArgumentError, match="sram: got 0"):
        flash_traffic(8, head_dim=4, sram=0)
