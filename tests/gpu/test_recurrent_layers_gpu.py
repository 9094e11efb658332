"""Every recurrent layer on a GPU: what it gives on a CPU in float64, forward, gradients and step by step."""

from __future__ import annotations

import pytest
import torch
from tests.conformance.cases import example

from regard import create
from regard.patterns import causal
from regard.registry import entries

pytestmark = pytest.mark.gpu
KEYS = [entry.key for entry in entries("layer", family="recurrent")]


@pytest.mark.filterwarnings("ignore:.*runs in plain torch on a GPU")  # a mixer that computes in float32 may be too wide
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-4), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("key", KEYS)
def test_as_on_a_cpu(key: str, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    made = example(key)
    layer = create(key, dim=made.dim, heads=made.heads, **made.settings).to(dtype)
    x = torch.randn(2, 70, made.dim).to(dtype)
    results = []
    for device, precision in (("cpu", torch.float64), ("cuda", dtype)):
        moved, tokens = layer.to(device, precision), x.to(device, precision).requires_grad_()
        out = moved(tokens, pattern=causal()).out
        results.append((out, torch.autograd.grad(out.double().square().mean(), tokens)[0]))
        layer = layer.to("cpu", dtype)
    for ours, truth in zip(results[1], results[0], strict=True):
        error = (ours.cpu().double() - truth).norm() / truth.norm()
        assert error < limit, (key, error)


@pytest.mark.filterwarnings("ignore:.*runs in plain torch on a GPU")
@pytest.mark.parametrize("key", KEYS)
def test_steps_are_the_whole(key: str) -> None:
    torch.manual_seed(0)
    made = example(key)
    layer = create(key, dim=made.dim, heads=made.heads, **made.settings).cuda()
    x = torch.randn(2, 20, made.dim, device="cuda")
    with torch.no_grad():
        whole = layer(x, pattern=causal()).out
        out, state = layer(x[:, :16], pattern=causal())[:2]
        outs = [out]
        for t in range(16, 20):
            out, state = layer(x[:, t : t + 1], pattern=causal(), state=state)[:2]
            outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-3, atol=1e-3)
