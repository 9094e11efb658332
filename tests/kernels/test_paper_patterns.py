"""Patterns of papers through every executor: dense masks, left-padded rows, a decoded token, gradients."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.paper_patterns import SMALL, paper_patterns
from torch import Tensor

from regard.attend import attend

N = SMALL
PATTERNS = paper_patterns(N)
FLEX = {"aki", "s2", "flashattention"}  # each costs the tracing of an uncompiled kernel
RUNS = [
    (name, backend)
    for name in PATTERNS
    for backend in ("reference", "sdpa", "flex")
    if backend != "flex" or name in FLEX
]


def qkv(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, h, n, 8, dtype=torch.float64) for h in (4, 2, 2))  # type: ignore[return-value]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = (q @ k.mT / 8**0.5).masked_fill(~mask, torch.finfo(torch.float64).min)
    return (logits.softmax(-1) * mask) @ v  # zeros for a query that sees nothing


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_every_executor_obeys(name: str, backend: str) -> None:
    p, (q, k, v) = PATTERNS[name], qkv()
    out = attend(q, k, v, pattern=p, backend=backend)
    torch.testing.assert_close(out, dense(q, k, v, p.dense(N)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PATTERNS)
def test_padding_on_the_left_and_the_last_token_alone(name: str) -> None:
    """Positions are those of real tokens: a padded row sees what it sees without its padding."""
    p, (q, k, v) = PATTERNS[name], qkv()
    real = torch.ones(2, N, dtype=torch.bool)
    real[1, :6] = False
    out = attend(q, k, v, pattern=p, key_padding=real)
    mask = p.dense(N).expand(2, -1, -1, -1)
    torch.testing.assert_close(out[0], dense(q, k, v, mask)[0], rtol=0, atol=1e-12)
    alone = dense(q[1:, :, 6:], k[1:, :, 6:], v[1:, :, 6:], mask[1:, :, : N - 6, : N - 6])
    torch.testing.assert_close(out[1:, :, 6:], alone, rtol=0, atol=1e-12)
    last = attend(q[:, :, -1:], k, v, pattern=p, q_positions=torch.full((2, 1), N - 1))
    torch.testing.assert_close(last, dense(q, k, v, mask)[:, :, -1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["s2", "bamm"])
def test_gradients(name: str) -> None:
    p = PATTERNS[name]
    leaves = [x.requires_grad_() for x in qkv()]
    weight = torch.randn(2, 4, N, 8, dtype=torch.float64)
    got = torch.autograd.grad((attend(*leaves, pattern=p) * weight).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((dense(*leaves, p.dense(N)) * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
