"""Patterns on grids as FlexAttention calls them, and through every executor that runs on this machine."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from regard.attend import attend
from regard.patterns import (
    Pattern,
    bico,
    causal,
    clear,
    croc,
    enerverse,
    halonet,
    m_var,
    neighborhood,
    per_head,
    radial_attention,
    sener,
)
from regard.patterns.permutation import Tiling, permuted
from regard.patterns.radial import radial_blocks

FLAGS = torch.arange(30) % 4 == 1
PATTERNS = [
    neighborhood((5, 6), (3, 4), (2, 1), causal=(True, False)),
    neighborhood((5, 6), (2, 3), dilation=2),
    neighborhood(30, 2, dilation=11),
    halonet((5, 6), 2, 1),
    clear((4, 7), 2, text=2),
    radial_attention(14, 2, after=2),
    radial_blocks(4, 7, text=2, block=4),
    m_var((1, 2, 5)),
    enerverse(6, 2, [0, 3], tokens=5),
    croc(torch.where(torch.arange(30) < 9, 0, -1)),
    bico(torch.stack([FLAGS, ~FLAGS])),
    sener(3, 2),
    permuted(neighborhood((5, 6), 3), Tiling((5, 6), (2, 4))),
    per_head([radial_attention(15, 2), ~clear((5, 6), 3)]) & (causal() | halonet((5, 6), 3, 0)),
]


@pytest.mark.parametrize("p", PATTERNS, ids=repr)
def test_as_flex_calls_it(p: Pattern) -> None:
    n = p.extent or 30
    drawn = create_mask(lambda b, h, i, j: p.rule(b, h, i, j), p.rows or 1, p.heads or 1, n, n, device="cpu")
    assert torch.equal(drawn, p.dense(n))


@pytest.mark.parametrize("p", PATTERNS, ids=repr)
def test_executors_agree(p: Pattern) -> None:
    n = p.extent or 30
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 16, generator=g, dtype=torch.float64) for heads in (2, 1, 1))
    logits = (q @ k.mT / 4).masked_fill(~p.dense(n), -torch.inf)
    want = logits.softmax(-1).nan_to_num(0.0) @ v  # a row that sees nothing gives zeros
    for backend in ("reference", "sdpa", "flex"):
        torch.testing.assert_close(attend(q, k, v, pattern=p, backend=backend), want, rtol=0, atol=1e-10)


def test_the_cost_of_tiles_is_that_of_blocks() -> None:
    p, tiling = neighborhood((8, 12), (3, 5), (1, 2)), Tiling((8, 12), (2, 4))
    tiled = permuted(p, tiling)
    counted, looked = tiled.cost(96, block=8, heads=3), Pattern.cost(tiled, 96, block=8, heads=3)
    assert counted == looked and counted.partial > 0
    ragged = permuted(p, Tiling((8, 12), (3, 4)))
    assert ragged.cost(ragged.extent, block=12).entries == p.cost(96, block=12).entries == counted.entries // 3


GPU = [
    (neighborhood((64, 64), (24, 24), (8, 8)), Tiling((64, 64), (8, 16))),
    (neighborhood((61, 67), (9, 9), dilation=(1, 3)), Tiling((61, 67), (8, 16))),
    (clear((48, 64), 8, text=77), Tiling((48, 64), (8, 16), before=77)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["flex", "triton"])
@pytest.mark.parametrize(("p", "tiling"), GPU, ids=repr)
def test_tiled_on_a_gpu(p: Pattern, tiling: Tiling, backend: str) -> None:
    from regard.attend_tiled import attend_tiled

    g = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(1, heads, p.extent, 64, generator=g, device="cuda").requires_grad_() for heads in (4, 2, 2))
    results = []
    for out in (
        attend(q, k, v, pattern=p, backend="reference"),
        attend_tiled(q, k, v, pattern=p, tiling=tiling, backend=backend),
    ):
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
    tiled = permuted(p, tiling)
    n = tiled.extent
    assert torch.equal(tiled.block_map(n, device="cuda").expand().cpu(), tiled.block_map(n).expand())
