"""The checks of settings, and the sizes that were once taken at 0."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError
from regard.layers import create
from regard.layers.checks import flags, from_zero, positive, sizes


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, torch.tensor(1)])
def test_a_size_is_an_int_from_1(value: object) -> None:
    sizes(a=1, b=7)
    with pytest.raises(ArgumentError, match=r"^b: got .*; allowed: an int ≥ 1"):
        sizes(a=1, b=value)


@pytest.mark.parametrize("value", [0, -1, 0.0, torch.inf, torch.nan, "1", None, True])
def test_positive_is_finite_and_above_0(value: object) -> None:
    positive(a=1e-30, b=3)
    with pytest.raises(ArgumentError, match=r"^b: got .*; allowed: a finite number above 0"):
        positive(a=1, b=value)


@pytest.mark.parametrize("value", [-1e-9, 1, torch.inf, torch.nan, "0", None, False])
def test_from_zero_to_below(value: object) -> None:
    from_zero("a", 0, below=1)
    from_zero("a", 5.0)
    with pytest.raises(ArgumentError, match=r"^a: got .*; allowed: a number from 0 to below 1"):
        from_zero("a", value, below=1)


@pytest.mark.parametrize("value", ["false", 0, 1, None])
def test_a_flag_is_a_bool(value: object) -> None:
    flags(a=True, b=False)
    with pytest.raises(ArgumentError, match=r"^b: got .*; allowed: True or False"):
        flags(a=True, b=value)


@pytest.mark.parametrize("key", ["gated-linear-attention", "deltanet", "gated-deltanet", "retnet", "mamba-2"])
def test_no_head_is_of_width_0(key: str) -> None:
    for name in ("key_dim", "value_dim", "chunk_size"):
        with pytest.raises(ArgumentError, match=rf"^{name}: got 0; allowed: an int ≥ 1"):
            create(key, dim=16, heads=4, **{name: 0})


def test_a_layer_whose_maps_cast_is_left_alone() -> None:
    class Casting(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    layer = create("multi-head-attention", dim=16, heads=2)
    with pytest.raises(ArgumentError, match=r"^x: got torch\.bfloat16"):
        layer(torch.randn(1, 3, 16).bfloat16())
    for module in layer.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Casting
    assert layer(torch.randn(1, 3, 16).bfloat16()).out.dtype == torch.bfloat16
