"""Hedgehog: its variants, its two directions, its rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError
from regard.layers.hedgehog import Hedgehog
from regard.layers.rotary import rotate
from regard.patterns import causal, full

VARIANTS = ["softmax-halves", "joint-softmax", "exp"]


def trained(**settings) -> Hedgehog:
    """Maps that are no longer the identity."""
    layer = Hedgehog(16, 4, **settings).double()
    for part in (layer.q_map, layer.k_map):
        part.weight.data += 0.3 * torch.randn_like(part.weight)
        part.bias.data += torch.randn_like(part.bias)
    return layer


def by_hand(layer: Hedgehog, x: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    if layer.rotary:
        q, k = (rotate(t, torch.arange(x.shape[1])[None]) for t in (q, k))
    u = [torch.einsum("bhnd,hde->bhne", t, part.weight) + part.bias for t, part in ((q, layer.q_map), (k, layer.k_map))]
    make = {
        "exp": lambda t: torch.cat([t.exp(), (-t).exp()], -1),
        "softmax-halves": lambda t: torch.cat([t.softmax(-1), (-t).softmax(-1)], -1),
        "joint-softmax": lambda t: torch.cat([2 * t, -2 * t], -1).softmax(-1),
    }[layer.features]
    weight = (make(u[0]) @ make(u[1]).mT) * mask
    return layer.o_proj((weight / weight.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("features", VARIANTS)
def test_both_directions_are_row_normalised_products_of_features(features: str, rotary: bool) -> None:
    layer, x = trained(features=features, rotary=rotary, eps=0.0, chunk_size=4), torch.randn(2, 11, 16).double()
    ones = torch.ones(11, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x, pattern=causal()).out, by_hand(layer, x, ones.tril()), rtol=0, atol=1e-12)
    for pattern in (None, full()):
        torch.testing.assert_close(layer(x, pattern=pattern).out, by_hand(layer, x, ones), rtol=0, atol=1e-12)


@pytest.mark.parametrize("features", VARIANTS)
def test_every_variant_decodes_with_its_rotation_going_on(features: str) -> None:
    layer, x = trained(features=features, rotary=True), torch.randn(2, 9, 16).double()
    want = layer(x, pattern=causal()).out
    _, state, _ = layer(x[:, :5], pattern=causal())
    torch.testing.assert_close(layer(x[:, 5:], pattern=causal(), state=state).out, want[:, 5:], rtol=0, atol=1e-12)
    _, state, _ = layer(x[:, :8])  # the same state, however the tokens read each other
    torch.testing.assert_close(layer(x[:, 8:], pattern=causal(), state=state).out, want[:, 8:], rtol=0, atol=1e-12)


def test_a_huge_query_does_not_overflow() -> None:
    layer, x = Hedgehog(16, 4, features="exp"), torch.randn(1, 5, 16)
    layer.q_proj.weight.data *= 1000
    assert layer(x, pattern=causal()).out.isfinite().all()


def test_bad_settings_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean joint-softmax"):
        Hedgehog(16, 4, features="joint-softmaxx")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^rotary: got head dim 3"):
        Hedgehog(6, 2, rotary=True)
    layer, x = Hedgehog(16, 4), torch.randn(1, 5, 16)
    with pytest.raises(ArgumentError, match=r"^state: got"):
        layer(x, state=Hedgehog(16, 2)(x).state)
