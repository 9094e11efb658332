"""What the claim on EE-MLLM's prefill times is the composite layer, here where there is no GPU to time it on."""

from __future__ import annotations

import torch

from regard.evidence.claims.ee_mllm import _Layer, _through


def test_without_visual_queries_it_is_the_layer_under_the_pattern() -> None:
    torch.manual_seed(0)
    layer = _Layer(32, 48).double()
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x, 12, composite=True), layer.masked(x, 12), rtol=0, atol=1e-12)
    assert (layer(x, 12, composite=True) - layer(x, 12, composite=False)).abs().max() > 1e-3
    assert _through([layer, layer], x, 12, composite=True).shape == x.shape
