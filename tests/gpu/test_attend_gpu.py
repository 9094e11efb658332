"""Executors on a GPU against the reference in float64 there (itself held against the definition on the CPU)."""

from __future__ import annotations

import pytest
import torch
from tests.naive_attention import qkv
from torch import Tensor

from regard import patterns as P
from regard.attend import attend, merge
from regard.kernels import dispatch, flex

pytestmark = pytest.mark.gpu
BACKENDS = ("reference", "sdpa", "flex")
N = 300  # no multiple of a block


def sample(dtype: torch.dtype, n: int = N, m: int = N, value_width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv(n=n, m=m, width=64, value_width=value_width, dtype=dtype, device="cuda")
    return q, k, v


def check(given: dict, qkv: tuple[Tensor, ...], backend: str, real: Tensor | None = None) -> None:
    """Outputs, and gradients of a random projection of them, beside the reference in float64."""
    up = torch.randn(*qkv[0].shape[:3], qkv[2].shape[3], device="cuda", dtype=torch.float64)
    if real is not None:
        up = up * real[:, None, :, None]
    results = []
    for dtype, name in ((torch.float64, "reference"), (qkv[0].dtype, backend)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = attend(*leaves, **given, backend=name)
        results.append([out, *torch.autograd.grad(out, leaves, up.to(dtype))])
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[qkv[0].dtype]
    for truth, ours in zip(*results, strict=True):
        assert ours.dtype == qkv[0].dtype and ours.isfinite().all()
        assert (ours - truth).abs().max() <= rounding * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", (*BACKENDS, "triton"))
def test_window_and_sinks(backend: str, dtype: torch.dtype) -> None:
    check({"pattern": P.causal() & (P.sliding_window(90) | P.attention_sink(4))}, sample(dtype), backend)


@pytest.mark.parametrize("backend", (*BACKENDS, "triton"))
def test_causal_with_other_value_width(backend: str) -> None:
    check({"pattern": P.causal()}, sample(torch.bfloat16, value_width=32), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", (*BACKENDS, "triton"))
def test_the_last_queries_of_more_keys(backend: str, dtype: torch.dtype) -> None:
    check({"pattern": P.causal()}, sample(dtype, n=70, m=N), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_documents_and_rows_that_see_nothing(backend: str) -> None:
    ids = torch.tensor([[0] * 100 + [1] * 150 + [-1] * 50, [7] * 300])
    real = torch.ones(2, N, dtype=torch.bool, device="cuda")
    real[1, :40] = False
    q, k, v = sample(torch.float32)
    k, v = (x.masked_fill(~real[:, None, :, None], torch.nan) for x in (k, v))
    given = {"pattern": P.causal() & P.documents(ids), "key_padding": real}
    check(given, (q, k, v), backend, real)
    out = attend(q, k, v, **given, backend=backend)
    assert (out[0, :, 250:] == 0).all() and (out[0, :, :250] != 0).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruned_cache(backend: str) -> None:
    q, k, v = sample(torch.float32, n=5)
    positions = torch.stack([torch.randperm(N) for _ in range(4)]).view(2, 2, N).cuda()
    lengths = torch.tensor([[N, 17], [200, 0]], device="cuda")
    k, v = (x.masked_fill((torch.arange(N, device="cuda") >= lengths[..., None])[..., None], torch.nan) for x in (k, v))
    i = torch.tensor([[295, 296, 297, 298, 299], [3, 90, 150, 280, 290]], device="cuda")
    given = {"q_positions": i, "kv_positions": positions, "kv_lengths": lengths}
    check({"pattern": P.causal() & P.sliding_window(150), **given}, (q, k, v), backend)


def test_flex_with_softcap_learned_score_sinks_and_lse() -> None:
    q, k, v = sample(torch.float32)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "flex")):
        sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda", dtype=dtype, requires_grad=True)
        slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], device="cuda", dtype=dtype, requires_grad=True)
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]

        def score(logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, slopes: Tensor = slopes) -> Tensor:
            return logits + slopes[h] * (j - i)

        given = {"pattern": P.causal(), "softcap": 5.0, "score": score, "sinks": sinks}
        out, lse = attend(*leaves, **given, return_lse=True, backend=backend)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), [*leaves, sinks, slopes])])
    for truth, ours in zip(*results, strict=True):
        assert (ours - truth).abs().max() <= 1e-4 * truth.abs().max()


def test_flex_shards_merge_into_the_whole() -> None:
    q, k, v = sample(torch.bfloat16)
    where = torch.arange(N, device="cuda").expand(2, N)
    given = {"pattern": P.causal(), "q_positions": where, "return_lse": True}
    parts = [
        attend(q, k[:, :, s], v[:, :, s], kv_positions=where[:, s], **given, backend="flex")
        for s in (slice(0, 140), slice(140, N))
    ]
    truth, lse = attend(q.double(), k.double(), v.double(), **given)
    out, total = merge(parts)
    assert (out - truth).abs().max() <= 2e-2 * truth.abs().max() and (total - lse).abs().max() < 1e-2


def test_other_ids_do_not_compile_again() -> None:
    torch._dynamo.utils.counters.clear()
    q, k, v = sample(torch.bfloat16, n=256, m=256)
    for cut in (50, 128, 200):
        ids = (torch.arange(256) >= cut).long()
        attend(q, k, v, pattern=P.causal() & P.documents(ids), backend="flex")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_window_and_a_length_are_compiled_once_each() -> None:
    """And are right, backward included: a kernel for one window does not serve another."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for n, window in ((256, 30), (419, 55), (256, 30)):
        check({"pattern": P.dilated_window(window, 3)}, sample(torch.float32, n=n, m=n), "flex")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_more_kernels_than_torch_allows_by_default() -> None:
    """Three structures where torch allows one: none may end in the unfused fallback, chosen without a word."""
    q, k, v = sample(torch.bfloat16, n=2048, m=2048)
    pattern = P.causal()
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for extra in range(3):
            pattern = pattern & (P.sliding_window(100 + extra) | P.attention_sink(extra + 1))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            attend(q, k, v, pattern=pattern, backend="flex")
            assert torch.cuda.max_memory_allocated() - before < 64 << 20  # the map in float32: 128 MiB


def test_a_block_map_made_under_inference_mode_serves_a_backward() -> None:
    given = {"pattern": P.causal() & P.sliding_window(77)}
    with torch.inference_mode():
        attend(*sample(torch.float32), **given, backend="flex")
    check(given, sample(torch.float32), "flex")


def test_long_sequences_never_meet_a_map_of_queries_by_keys() -> None:
    q, k, v = qkv(batch=1, n=32768, width=64, value_width=64, dtype=torch.bfloat16, device="cuda")
    pattern = P.causal() & (P.sliding_window(256) | P.attention_sink(4))
    outs = []
    for backend in BACKENDS:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outs.append(attend(q, k, v, pattern=pattern, backend=backend))
        assert torch.cuda.max_memory_allocated() - before < 768 << 20  # a map of bytes alone would be 1 GiB
    for out in outs[1:]:
        assert (out - outs[0]).abs().max() < 2e-2


def test_auto_prefers_what_is_fast() -> None:
    q, k, v = qkv(batch=1, n=4096, width=64, value_width=64, dtype=torch.bfloat16, device="cuda")
    window = P.causal() & P.sliding_window(64)
    sparse = "hopper" if torch.cuda.get_device_capability()[0] == 9 else "triton"
    for given, expected in (
        ({}, "sdpa"),
        ({"pattern": P.causal()}, "sdpa"),
        ({"pattern": window}, sparse),
        ({"pattern": P.causal(), "return_lse": True}, sparse),
    ):
        assert attend(q, k, v, **given, explain=True)[-1].executor == expected
    assert attend(q[:, :, -500:], k, v, pattern=P.causal(), explain=True)[-1].executor == "sdpa"
    assert attend(q[:, :, -500:], k, v, pattern=window, explain=True)[-1].executor == sparse
    assert attend(q[:, :, -1:], k, v, pattern=window, explain=True)[-1].executor == "sdpa"
    dispatch._announced.clear()
    with pytest.warns(UserWarning, match="plain torch reference"):
        attend(q, k, v, normalizer=lambda logits, visible: logits.relu() * visible)


def test_flex_refuses_by_name() -> None:
    q, k, v = sample(torch.float64)
    request = dispatch.Request(q, k, v, 1.0, torch.zeros(1, N), torch.zeros(1, 1, N))
    assert "float64" in (flex.refuses(request) or "")
    narrow = dispatch.Request(
        q[..., :8].float(), k[..., :8].float(), v.float(), 1.0, torch.zeros(1, N), torch.zeros(1, 1, N)
    )
    assert "at least 16" in (flex.refuses(narrow) or "")
