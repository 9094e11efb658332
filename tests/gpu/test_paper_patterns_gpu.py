"""Patterns of papers on a GPU: block maps as on a CPU, and the kernels that skip tiles against the reference.

The block-sparse kernels run for every pattern, in bfloat16 and float32; FlexAttention, which is compiled anew for each
pattern, for two that differ in kind.
"""

from __future__ import annotations

import pytest
import torch
from tests.kernels.paper_patterns import HEADS, KV_HEADS, LARGE, paper_patterns

from regard.attend import attend

pytestmark = pytest.mark.gpu
PATTERNS = paper_patterns(LARGE)
FLEX = ("aki", "s2")  # ids of each row; a rule of each head
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # as in test_attend_gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
RUNS = [
    *((name, "triton", dtype) for name in PATTERNS for dtype in ROUNDING),
    *((name, "hopper", torch.bfloat16) for name in PATTERNS if HOPPER),
    *((name, "flex", torch.bfloat16) for name in FLEX),
]


@pytest.mark.parametrize("name", PATTERNS)
def test_the_map_is_that_of_the_cpu(name: str) -> None:
    p = PATTERNS[name]
    for block in (64, 100):
        here, there = p.block_map(LARGE, block=block), p.to("cuda").block_map(LARGE, block=block, device="cuda")
        assert there.kinds.is_cuda and torch.equal(here.kinds, there.kinds.cpu())


@pytest.mark.parametrize(("name", "backend", "dtype"), RUNS)
def test_kernels_obey_forward_and_backward(name: str, backend: str, dtype: torch.dtype) -> None:
    """q, k and v are of the dtype already when the truth is computed of them in float64."""
    p = PATTERNS[name]
    q, k, v, up = (torch.randn(2, h, LARGE, 64, device="cuda").to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    results = []
    for held, executor in ((torch.float64, "reference"), (dtype, backend)):
        leaves = [x.to(held).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, pattern=p, backend=executor)
        results.append([out, *torch.autograd.grad(out, leaves, up.to(held))])
    for truth, ours in zip(*results, strict=True):
        assert ours.dtype == dtype and ours.isfinite().all()
        assert (ours - truth).abs().max() <= ROUNDING[dtype] * truth.abs().max()
