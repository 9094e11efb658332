"""Gradients of the differentiable executors against autograd through the definition, and finite differences."""

from __future__ import annotations

import pytest
import torch
from tests.naive_attention import naive, qkv
from torch import Tensor

from regard import patterns as P
from regard.attend import attend
from regard.kernels import strips


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("pattern", [P.causal(), P.causal() & ~P.sliding_window(2)], ids=["causal", "empty rows"])
def test_gradients_are_those_of_the_definition(backend: str, pattern: P.Pattern) -> None:
    leaves = [x.requires_grad_() for x in qkv(n=9)]
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 7:] = False
    seen = pattern.dense(9) & real[:, None, None, :]
    up = torch.randn(2, 4, 9, 12, dtype=torch.float64) * real[:, None, :, None]
    out = attend(*leaves, pattern=pattern, key_padding=real, backend=backend)
    ours = torch.autograd.grad(out, leaves, up)
    theirs = torch.autograd.grad(naive(*leaves, seen)[0], leaves, up)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("in_strips", [False, True])
def test_reference_with_everything_at_once(in_strips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradcheck of out and lse with soft cap, learned score, sinks, padding and empty rows."""
    if in_strips:
        monkeypatch.setattr(strips, "STRIP_ELEMENTS", 2 * 2 * 4 * 2)
    q, k, v = qkv(heads=2, kv_heads=1, n=4, width=2, value_width=1)
    sinks, slopes = torch.randn(2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    real = torch.tensor([[True] * 4, [False, True, True, True]])
    pattern = P.causal() & ~P.sliding_window(2)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return attend(
            q, k, v, pattern=pattern, softcap=2.0, score=lambda s, b, h, i, j: s + slopes[h] * (j - i), sinks=sinks,
            key_padding=real, return_lse=True, backend="reference",
        )  # fmt: skip

    leaves = [x.requires_grad_() for x in (q, k, v, sinks, slopes)]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_no_nan_in_gradients_of_empty_rows_or_from_spoilt_slots(backend: str) -> None:
    q, k, v = qkv(n=6, dtype=torch.float32)
    k[0, 0, 4:], v[0, 0, 4:] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    lengths = torch.tensor([[4, 6], [0, 6]])
    where = torch.arange(6).expand(2, 6)
    out = attend(
        *leaves, pattern=P.causal() & ~P.sliding_window(3), q_positions=where, kv_lengths=lengths, backend=backend
    )
    grads = torch.autograd.grad(out.sum() + out.square().sum(), leaves)
    assert all(g.isfinite().all() for g in (out, *grads))
    assert (grads[0][:, :, :3] == 0).all() and (grads[0][1, :2] == 0).all() and (grads[2][1, 0] == 0).all()
    assert (grads[2][0, 0, 4:] == 0).all() and (grads[2][0, 0, :3] != 0).any()


def test_lse_of_an_empty_row_has_no_nan_gradient() -> None:
    leaves = [x.requires_grad_() for x in qkv(n=4)]
    _, lse = attend(*leaves, pattern=~P.causal(), return_lse=True)
    grads = torch.autograd.grad(lse[:, :, :3].sum() + lse[:, :, 3].clamp(min=-5).sum(), leaves[:2])
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_backward_in_strips_keeps_no_map_of_queries_by_keys(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the forward saves: one strip keeps its map, several keep nothing (they are computed again)."""
    leaves = [x.requires_grad_() for x in qkv(batch=1, heads=1, kv_heads=1, n=256, dtype=torch.float32)]

    def largest_kept() -> int:
        kept = [0]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            attend(*leaves, pattern=P.causal() & P.sliding_window(30), backend=backend)
        return max(kept)

    assert largest_kept() >= 256 * 256
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 1 << 14)
    assert largest_kept() < 256 * 256 // 4
