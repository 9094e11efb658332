"""Linear attention in low precision: under autocast, and with weights of bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.layers import create
from regard.patterns import causal

CASES: dict[str, dict[str, Any]] = {
    "aaren": {},
    "based": {"feature_dim": 8},
    "hedgehog": {"features": "exp"},
    "normalised-attention": {},
    "base-conv": {},
    "lightning-attention": {},
    "transnormerllm": {},
}


@pytest.mark.parametrize("key", CASES)
def test_low_precision_is_near_and_states_stay_in_float32(key: str) -> None:
    torch.manual_seed(0)
    layer, x = create(key, dim=32, heads=2, **CASES[key]), torch.randn(2, 200, 32)
    narrow = create(key, dim=32, heads=2, **CASES[key])
    narrow.load_state_dict(layer.state_dict())
    for pattern in [causal()] + [None] * (key == "hedgehog"):
        want = layer(x, pattern=pattern).out
        with torch.autocast("cpu", dtype=torch.bfloat16):
            auto = layer(x, pattern=pattern)
        for out, state, _ in (auto, narrow.bfloat16()(x.bfloat16(), pattern=pattern)):
            assert out.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in state.inner)
            assert (out - want).norm() <= 0.02 * want.norm()


def test_taylor_weights_stay_positive_where_rounded_features_would_not() -> None:
    torch.manual_seed(0)
    layer, x = create("based", dim=16, heads=1, feature_dim=4).bfloat16(), torch.randn(1, 400, 16).bfloat16()
    for part in (layer.q_proj, layer.k_proj):
        part.weight.data *= 30
    inputs = layer.read(x, None, None).inputs
    assert (inputs.q @ inputs.k.mT).min() > 0.4
    assert (inputs.q.bfloat16().float() @ inputs.k.bfloat16().float().mT).min() < 0
