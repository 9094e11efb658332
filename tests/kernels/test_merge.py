"""Merging parts of the keys is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from tests.naive_attention import naive, qkv

from regard import patterns as P
from regard.attend import apply_sinks, attend, merge
from regard.errors import ArgumentError


@pytest.mark.parametrize("backend", ["reference", "flex"])
def test_two_shards_are_the_whole(backend: str) -> None:
    q, k, v = qkv(n=20)
    where = torch.arange(20).expand(2, 20)
    given = {"pattern": P.causal() & P.sliding_window(6), "q_positions": where, "return_lse": True, "backend": backend}
    shards = [
        attend(q, k[:, :, s], v[:, :, s], kv_positions=where[:, s], **given)
        for s in (slice(0, 7), slice(7, 15), slice(15, 20))
    ]
    assert (shards[2][1] == -torch.inf).any()
    out, lse = merge(shards)
    expected = naive(q, k, v, (P.causal() & P.sliding_window(6)).dense(20))
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-12)


def test_sinks_are_given_to_one_shard_or_added_afterwards() -> None:
    q, k, v = qkv(n=8)
    sinks = torch.randn(4, dtype=torch.float64)
    expected = naive(q, k, v, torch.ones(1, dtype=torch.bool), sinks=sinks)
    first = attend(q, k[:, :, :3], v[:, :, :3], sinks=sinks, return_lse=True)
    second = attend(q, k[:, :, 3:], v[:, :, 3:], return_lse=True)
    without = attend(q, k[:, :, :3], v[:, :, :3], return_lse=True)
    for out, lse in (merge([first, second]), apply_sinks(*merge([without, second]), sinks)):
        torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-12)


def test_parts_that_saw_nothing() -> None:
    out, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    nothing = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    joined = merge([nothing, (out, lse), nothing])
    torch.testing.assert_close(joined[0], out)
    torch.testing.assert_close(joined[1], lse)
    zeros, minus = merge([nothing, nothing])
    assert (zeros == 0).all() and (minus == -torch.inf).all()
    assert torch.equal(merge([(out, lse)])[0], out)


def test_gradients_pass_through_outputs_and_lse_also_beside_parts_that_saw_nothing() -> None:
    out, lse = (torch.randn(2, 1, 2, 3, 2).double(), torch.randn(2, 1, 2, 3).double())
    sinks = torch.randn(2).double()
    lse[1, 0, 0] = -torch.inf
    lse[:, 0, 1, 0] = -torch.inf

    def run(a, b, s):
        joined = merge([(a[0], b[0]), (a[1], b[1])])
        return (*apply_sinks(*joined, s), joined[0])

    leaves = [x.requires_grad_() for x in (out, lse, sinks)]
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(x.sum() for x in run(*leaves)), leaves))
    finite = [x.detach().nan_to_num(neginf=-1.0).requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(run, finite)


def test_large_logits_and_low_precision() -> None:
    out, lse = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16), torch.full((1, 1, 1), 3e4)
    joined, total = merge([(out, lse), (3 * out, lse)])
    assert joined.dtype == torch.bfloat16 and (joined == 2).all() and total.isfinite().all()


def test_bad_parts() -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    for parts in ([], [(out, lse[..., :2])], [(out, lse), (out[:, :1], lse)], [(out, lse), (out, lse[:, :1])]):
        with pytest.raises(ArgumentError, match="parts"):
            merge(parts)
