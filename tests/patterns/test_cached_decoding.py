"""What the papers decode with a cache equals computing everything again under the pattern, through several layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from regard.attend import attend
from regard.patterns import Pattern, bamm, moa_mixture_of_sparse_attention, next_block_prediction, s2_attention

HEADS, DIM = 4, 8
Keeps = Callable[[int, int, int], bool]


class Net:
    """Three layers of attention in 4 heads, each of its own projections of the tokens, with a residual; no training."""

    def __init__(self) -> None:
        self.layers = [torch.randn(3, HEADS, DIM, DIM, dtype=torch.float64) / DIM**0.5 for _ in range(3)]

    def project(self, layer: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (torch.einsum("nd,hde->hne", x, w)[None] for w in layer)
        return q, k, v

    def full(self, x: Tensor, pattern: Pattern) -> Tensor:
        """(N, D): all tokens at once."""
        for layer in self.layers:
            x = x + attend(*self.project(layer, x), pattern=pattern)[0].sum(0)
        return x

    def cached(self, x: Tensor, chunks: list[list[int]], keeps: Keeps = lambda head, q, k: True) -> Tensor:
        """(N, D): chunk after chunk, no mask inside one; each head attends to what it still holds.

        keeps(head, q, k): is key k still held by that head when query q comes? What is dropped never comes back."""
        out = torch.empty_like(x)
        held: list[list[dict[int, tuple[Tensor, Tensor]]]] = [[{} for _ in range(HEADS)] for _ in self.layers]
        for chunk in chunks:
            now = x[chunk]
            for layer, caches in zip(self.layers, held, strict=True):
                q, k, v = self.project(layer, now)
                new = torch.zeros_like(now)
                for h, cache in enumerate(caches):
                    cache |= {t: (k[0, h, n], v[0, h, n]) for n, t in enumerate(chunk)}
                    for t in [t for t in cache if not keeps(h, chunk[-1], t)]:
                        del cache[t]
                    keys, values = (torch.stack([entry[s] for entry in cache.values()])[None, None] for s in (0, 1))
                    new += attend(q[:, h : h + 1], keys, values)[0, 0]
                now = now + new
            out[chunk] = now
        return out


@pytest.fixture
def net() -> Net:
    return Net()


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_bamm_in_two_passes(net: Net) -> None:
    """Given tokens once, among themselves; then the others one by one, from a cache."""
    n = 11
    given = torch.tensor([t in (0, 2, 3, 7, 10) for t in range(n)])
    x = torch.randn(n, DIM, dtype=torch.float64)
    chunks = [given.nonzero()[:, 0].tolist(), *([t] for t in range(n) if not given[t])]
    same(net.cached(x, chunks), net.full(x, bamm(given)))
    pass_one = torch.arange(n) == 0
    same(net.cached(x, [[t] for t in range(n)]), net.full(x, bamm(pass_one)))


def test_next_blocks_one_after_another(net: Net) -> None:
    n, condition, block = 14, 2, 4
    x = torch.randn(n, DIM, dtype=torch.float64)
    chunks = [[0, 1], *(list(range(s, s + block)) for s in range(condition, n, block))]
    assert len(chunks) == 1 + (n - condition) // block, "one step per block"
    same(net.cached(x, chunks), net.full(x, next_block_prediction(block, condition, n)))


def test_s2_attention_with_blocks_dropped_for_good(net: Net) -> None:
    n, block, local, stride = 31, 2, 2, 4
    x = torch.randn(n, DIM, dtype=torch.float64)

    def keeps(head: int, q: int, k: int) -> bool:
        return q // block - k // block < local or (k // block + head) % stride == 0

    p = s2_attention(HEADS, local=local, stride=stride, block=block)
    same(net.cached(x, [[t] for t in range(n)], keeps), net.full(x, p))
    left = sum(keeps(0, n - 1, k) for k in range(n))
    assert left <= (local + (n // block - local) / stride + 1) * block


@pytest.mark.parametrize("inside", [True, False])
def test_moa_with_a_ring_needs_the_block_rule_inside_it(net: Net, inside: bool) -> None:
    """A ring of window · B tokens holds all that the pattern sees, and up to B − 1 tokens more."""
    n, block = 24, 4
    rules = [(4, 0), (8, 0), (0, 0.5), (-100, 0.1)]
    windows = [1, 2, 3, 1]
    x = torch.randn(n, DIM, dtype=torch.float64)

    def keeps(head: int, q: int, k: int) -> bool:
        in_ring = q - k < windows[head] * block
        seen = k >= (q // block - windows[head] + 1) * block
        return k < block or (in_ring and (seen or not inside))

    got = net.cached(x, [[t] for t in range(n)], keeps)
    want = net.full(x, moa_mixture_of_sparse_attention(rules, block=block).bind(n))
    if inside:
        same(got, want)
    else:
        assert (got - want).abs().max() > 1e-3
