"""A convolution as long as the sequence, against the sum written out."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError
from regard.layers.long_convolution import LongConvolution


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_it_is_the_sum_over_all_tokens_before_gradients_too(n: int) -> None:
    convolution = LongConvolution(3, bias=True, max_length=16).double()
    convolution.bias.data += 1
    x = torch.randn(2, n, 3, dtype=torch.float64)
    parameters, grads = list(convolution.parameters()), []
    slow_h = convolution.kernel(n)
    slow = torch.stack([(slow_h[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(n)], 1) + convolution.bias
    fast, window = convolution(x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    assert torch.equal(window, x)
    for out in (fast, slow):
        grads.append(torch.autograd.grad(out.sin().sum(), parameters))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_the_filter_of_a_distance_does_not_depend_on_the_length() -> None:
    convolution = LongConvolution(3, max_length=16).double()
    torch.testing.assert_close(convolution.kernel(40)[:7], convolution.kernel(7), rtol=0, atol=1e-14)
    assert convolution.kernel(40).std(0).min() > 0


def test_the_future_is_seen_to_rounding_only() -> None:
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        convolution, x = LongConvolution(4).to(dtype), torch.randn(1, 300, 4).to(dtype)
        changed = torch.cat([x[:, :200], 10 * x[:, 200:]], 1)
        assert (convolution(changed)[0] - convolution(x)[0])[:, :200].abs().max() <= allowed


def test_bad_input_is_named() -> None:
    convolution = LongConvolution(4)
    with pytest.raises(ArgumentError, match=r"^x: got \(1, 5, 3\)"):
        convolution(torch.zeros(1, 5, 3))
    with pytest.raises(ArgumentError, match=r"^state: got"):
        convolution(torch.zeros(1, 5, 4), None, torch.zeros(2, 5, 4))
    with pytest.raises(ArgumentError, match=r"^bands: got 0"):
        LongConvolution(4, bands=0)
