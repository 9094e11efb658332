"""The Hopper block-sparse kernels against the reference in float32, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.attend import attend
from regard.kernels.hopper.block_sparse import KEYS
from regard.kernels.hopper.schedule import key_works
from regard.kernels.triton.tile_lists import tiles_of
from regard.patterns import Pattern, attention_sink, causal, documents, full, per_head, sliding_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
    ),
]
WINDOW = causal() & (sliding_window(200) | attention_sink(4))
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 7e-4}
"""Relative, of outputs and gradients: twice what rounding weights and results to that type costs."""


def tensors(
    batch: int, heads: int, kv_heads: int, n: int, m: int, dim: int, dim_v: int, dtype: torch.dtype
) -> list[Tensor]:
    """q as a projection leaves it, (B, N, H, D) in memory, k and v (B, H, M, D)."""
    q = torch.randn(batch, n, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    return [q, *(torch.randn(batch, kv_heads, m, d, device="cuda", dtype=dtype) for d in (dim, dim_v))]


def results(inputs: list[Tensor], backend: str, pattern: Pattern, sinks: Tensor | None = None) -> list[Tensor]:
    """out, lse where finite, and the gradients of a sum of both."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    extra = None if sinks is None else sinks.detach().requires_grad_()
    out, lse = attend(*leaves, pattern=pattern, sinks=extra, return_lse=True, backend=backend)
    torch.manual_seed(1)
    lse = lse.masked_fill(~torch.isfinite(lse), 0)
    loss = (out.float() * torch.randn(out.shape, device="cuda")).sum()
    loss = loss + (lse * torch.randn(lse.shape, device="cuda")).sum()
    wanted = leaves if extra is None else [*leaves, extra]
    return [out, lse, *torch.autograd.grad(loss, wanted)]


def agree(inputs: list[Tensor], pattern: Pattern, sinks: Tensor | None = None) -> None:
    ours = results(inputs, "hopper", pattern, sinks)
    truth = results([x.float() for x in inputs], "reference", pattern, sinks)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), ours, truth, strict=False):
        error = (a.float() - b).norm() / b.norm().clamp_min(1e-6)
        assert error < TOLERANCE[inputs[0].dtype], f"{name}: {float(error)}"  # NaN fails too


IDS = torch.tensor([[0] * 300 + [1] * 477, [0] * 5 + [-1] * 200 + [2] * 572])
CASES: dict[str, tuple[tuple[int, ...], Pattern]] = {
    "window": ((1, 8, 2, 2048, 2048, 128, 128), WINDOW),
    "not whole blocks": ((2, 4, 2, 1000, 1000, 128, 128), causal()),
    "more keys than queries": ((1, 4, 4, 300, 1111, 64, 64), causal()),
    "documents": ((2, 4, 1, 777, 777, 128, 64), documents(IDS) & causal()),
    "queries that see nothing": ((1, 2, 1, 500, 500, 64, 128), ~causal()),
    "everything": ((1, 2, 2, 640, 640, 64, 64), full()),
    "by head": ((1, 4, 2, 700, 700, 128, 128), per_head([causal(), WINDOW, sliding_window(33), ~full()])),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, dtype: torch.dtype) -> None:
    shape, pattern = CASES[case]
    agree(tensors(*shape, dtype), pattern)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 127, 128, 129, 500, 2049])
def test_lengths(n: int) -> None:
    agree(tensors(1, 2, 1, n, n, 128, 128, torch.bfloat16), WINDOW)


def test_sinks_and_their_gradient() -> None:
    agree(tensors(1, 4, 2, 400, 400, 128, 128, torch.bfloat16), WINDOW, torch.randn(4, device="cuda"))


def test_inputs_as_they_lie_in_memory() -> None:
    """Slices of one projection, a batch that is one row repeated, rows that are not whole units of copies."""
    packed = torch.randn(2, 300, 12, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    agree([packed[:, :8], packed[:, 8:10], packed[:, 10:]], causal())
    k = torch.randn(1, 2, 300, 128, device="cuda", dtype=torch.bfloat16).expand(2, -1, -1, -1)
    agree([packed[:, :8], k, k], causal())
    odd = torch.randn(2, 8, 300, 131, device="cuda", dtype=torch.bfloat16)[..., :128]
    agree([odd, odd[:, :2], odd[:, 2:4]], causal())


def test_a_key_block_that_many_see_is_worked_on_in_pieces_and_results_repeat() -> None:
    pattern = causal() & (sliding_window(64) | attention_sink(4))
    inputs = tensors(1, 8, 1, 8192, 8192, 64, 64, torch.bfloat16)
    tiles = tiles_of(pattern, 8192, 8192, batch=1, heads=8, block=KEYS, device=torch.device("cuda", 0))
    assert key_works(tiles, 1, 1, torch.cuda.get_device_properties(0).multi_processor_count).pieces > 1
    agree(inputs, pattern)
    for first, second in zip(results(inputs, "hopper", pattern), results(inputs, "hopper", pattern), strict=True):
        assert torch.equal(first, second)


def test_it_is_the_first_asked() -> None:
    q, k, v = tensors(1, 2, 2, 4096, 4096, 128, 128, torch.bfloat16)
    assert attend(q, k, v, pattern=WINDOW, explain=True)[-1].executor == "hopper"
