"""The short convolution: its definition, padding anywhere, and the window."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import silu

from regard.errors import ArgumentError
from regard.layers.short_convolution import ShortConvolution


def inputs(n: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, n, 5, dtype=torch.float64, generator=g)
    real = torch.rand(3, n, generator=g) > 0.4
    real[0] = True
    return x, real


@pytest.mark.parametrize(("size", "bias"), [(1, False), (3, True), (4, False)])
def test_it_is_a_weighted_sum_of_the_last_tokens(size: int, bias: bool) -> None:
    layer, (x, _) = ShortConvolution(5, size, bias=bias).double(), inputs()
    out, _ = layer(x)
    for t in range(x.shape[1]):
        want = sum(layer.weight[:, -1 - i] * x[:, t - i] for i in range(size) if t >= i)
        torch.testing.assert_close(out[:, t], silu(want if layer.bias is None else want + layer.bias))


@pytest.mark.parametrize("size", [1, 4])
def test_padding_anywhere_counts_for_nothing_however_the_tokens_are_cut(size: int) -> None:
    layer, (x, real) = ShortConvolution(5, size).double(), inputs()
    junk = torch.where(real[..., None], x, torch.nan)
    for cuts in ((0, 11), (0, 1, 2, 11), tuple(range(12))):
        outs, window = [], None
        for start, stop in pairwise(cuts):
            out, window = layer(junk[:, start:stop], real[:, start:stop], window)
            outs.append(out)
        out = torch.cat(outs, 1)
        assert (out[~real] == 0).all() and window is not None
        for b in range(3):
            alone, last = layer(x[b : b + 1, real[b]])
            torch.testing.assert_close(out[b, real[b]], alone[0])
            torch.testing.assert_close(window[b], last[0])


def test_a_window_of_another_convolution_is_refused() -> None:
    layer, (x, _) = ShortConvolution(5, 4).double(), inputs()
    with pytest.raises(ArgumentError, match=r"^state: got \(3, 2, 5\); allowed: \(3, 3, 5\)"):
        layer(x, window=x[:, :2])
