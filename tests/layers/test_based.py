"""Based's linear attention: close to softmax for small scores, whatever the head width."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.errors import ArgumentError
from regard.layers.based import Based


def test_it_is_softmax_attention_to_third_order_in_the_scores() -> None:
    layer, x = Based(16, 2, feature_dim=4).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    gaps = []
    for scale in (1.0, 0.5, 0.25):
        q, k = (scale * p(x).view(2, 12, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
        v = layer.v_proj(x).view(2, 12, 2, 8).transpose(1, 2)
        softmax = layer.o_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        shrunk = Based(16, 2, feature_dim=4).double()
        shrunk.load_state_dict(layer.state_dict())
        for p in (shrunk.q_proj, shrunk.k_proj):
            p.weight.data *= scale
        gaps.append((shrunk(x).out - softmax).abs().max().item())
    # Scores are quartered each time, so what is left of third order falls to 1/64.
    assert gaps[0] < 0.05 and gaps[1] < gaps[0] / 30 and gaps[2] < gaps[1] / 50


def test_the_state_is_as_large_as_the_card_says_compressed() -> None:
    _, state, _ = Based(64, 4)(torch.randn(1, 9, 64))
    assert state.inner.s.shape == (1, 4, 153, 16 + 1) and state.inner.s.dtype == torch.float32


def test_a_prompts_state_does_not_hold_its_padding() -> None:
    layer, x = Based(16, 4, feature_dim=4).double(), torch.randn(1, 9, 16, dtype=torch.float64)
    padded = torch.cat([x, 100 * torch.ones(1, 3, 16, dtype=torch.float64)], 1)
    _, state, _ = layer(padded, key_padding=torch.arange(12)[None] < 9)
    torch.testing.assert_close(state.inner.s, layer(x).state.inner.s, rtol=0, atol=1e-12)


def test_bad_settings_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"^feature_dim: got 0"):
        Based(16, 4, feature_dim=0)
    with pytest.raises(ArgumentError, match=r"^eps: got -1"):
        Based(16, 4, eps=-1.0)
