"""Every executor against the definition: patterns, lengths, padding, positions, ragged caches, empty rows, strips."""

from __future__ import annotations

import pytest
import torch
from tests.naive_attention import naive, qkv, seen_under
from torch import Tensor

from regard import patterns as P
from regard.attend import attend
from regard.kernels import strips

BACKENDS = ("reference", "sdpa", "flex")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
IDS = torch.tensor([[0] * 10 + [1] * 23, [4] * 20 + [2] * 9 + [-1] * 4])

CASES = {
    "full": (P.full, lambda b, h, i, j: (i >= 0) & (j >= 0)),
    "causal": (P.causal, lambda b, h, i, j: j <= i),
    "window and sinks": (
        lambda: P.causal() & (P.sliding_window(5) | P.attention_sink(3)),
        lambda b, h, i, j: (j <= i) & ((i - j < 5) | (j < 3)),
    ),
    "dilated": (
        lambda: P.dilated_window(4, 3),
        lambda b, h, i, j: (i - j >= 0) & (i - j < 12) & ((i - j) % 3 == 0),
    ),
    "prefix": (lambda: P.causal() | P.prefix(6), lambda b, h, i, j: (j <= i) | (j < 6)),
    "not causal": (lambda: ~P.causal(), lambda b, h, i, j: j > i),
    "documents": (
        lambda: P.causal() & P.documents(IDS),
        lambda b, h, i, j: (j <= i) & (IDS[b, i] == IDS[b, j]) & (IDS[b, i] >= 0),
    ),
    "per head": (
        lambda: P.per_head([P.causal(), P.causal() & P.sliding_window(4), P.causal(), P.full()]),
        lambda b, h, i, j: ((j <= i) & ((h != 1) | (i - j < 4))) | (h == 3),
    ),
}


@every_backend
@pytest.mark.parametrize("case", CASES)
def test_patterns(backend: str, case: str) -> None:
    pattern, rule = CASES[case]
    q, k, v = qkv(n=33)
    out = attend(q, k, v, pattern=pattern(), backend=backend)
    where = torch.arange(33)
    torch.testing.assert_close(out, naive(q, k, v, seen_under(rule, 2, 4, where, where))[0], rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (63, 63), (130, 130), (1, 20), (5, 20), (20, 5)])
def test_lengths_with_queries_last(backend: str, n: int, m: int) -> None:
    if backend == "flex" and (n, m) not in ((1, 20), (130, 130)):
        pytest.skip("uncompiled flex takes half a second to trace; the two that differ most stand for all")
    q, k, v = qkv(batch=1, heads=2, kv_heads=1, n=n, m=m)
    if n > m:
        out, seen = attend(q, k, v, backend=backend), torch.ones(1, dtype=torch.bool)
    else:
        out = attend(q, k, v, pattern=P.causal(), backend=backend)
        seen = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    torch.testing.assert_close(out, naive(q, k, v, seen)[0], rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize("case", ["full", "causal", "window and sinks"])
def test_padding_equals_unpadded_rows(backend: str, case: str) -> None:
    """Left, right, and both with a hole; what lies in the padding is NaN."""
    if backend == "flex" and case == "full":
        pytest.skip("uncompiled flex takes half a second to trace")
    real = torch.ones(3, 21, dtype=torch.bool)
    real[0, :6] = False
    real[1, 15:] = False
    real[2, [0, 1, 7, 8, 19, 20]] = False
    q, k, v = qkv(batch=3, n=21)
    spoilt = [x.masked_fill(~real[:, None, :, None], torch.nan) for x in (k, v)]
    out = attend(q, *spoilt, pattern=CASES[case][0](), key_padding=real, backend=backend)
    assert out.isfinite().all()
    for b in range(3):
        alone = (x[b : b + 1, :, real[b]] for x in (q, k, v))
        expected = attend(*alone, pattern=CASES[case][0](), backend="reference")
        torch.testing.assert_close(out[b : b + 1, :, real[b]], expected, rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize("case", ["full", "causal", "window and sinks"])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_pruned_cache_is_dense_attention_over_what_was_kept(backend: str, case: str, per_head: bool) -> None:
    """Each lane keeps other tokens, in any order, and ends elsewhere; beyond its end lies NaN."""
    if backend == "flex" and case != "window and sinks":
        pytest.skip("uncompiled flex takes half a second to trace")
    pattern, rule = CASES[case]
    q, k, v = qkv(n=3, m=30)
    lanes = 2 if per_head else 1
    order = torch.stack([torch.stack([torch.randperm(30) for _ in range(lanes)]) for _ in range(2)])
    lengths = torch.tensor([[12, 7], [30, 1]]) if per_head else torch.tensor([[12, 12], [5, 5]])
    kept = torch.zeros(2, 2, 30, dtype=torch.bool)
    slots_k, slots_v = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
    for b in range(2):
        for h in range(2):
            chosen = order[b, h % lanes, : lengths[b, h]]
            kept[b, h, chosen] = True
            slots_k[b, h, : len(chosen)], slots_v[b, h, : len(chosen)] = k[b, h, chosen], v[b, h, chosen]
    i = torch.tensor([[27, 28, 29], [3, 10, 29]])
    out = attend(
        q, slots_k, slots_v, pattern=pattern(), q_positions=i, kv_positions=order if per_head else order[:, 0],
        kv_lengths=lengths, backend=backend,
    )  # fmt: skip
    seen = seen_under(rule, 2, 4, i, torch.arange(30)) & kept.repeat_interleave(2, 1)[:, :, None]
    torch.testing.assert_close(out, naive(q, k, v, seen)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "flex"])
@pytest.mark.parametrize("case", ["causal", "not causal"])
def test_softcap_score_sinks_and_lse(backend: str, case: str) -> None:
    pattern, rule = CASES[case]
    q, k, v = qkv(n=13)
    q, sinks, slopes = q * 5, torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    where = torch.arange(13)
    seen = seen_under(rule, 2, 4, where, where)
    bias = slopes[:, None, None] * (where - where[:, None])
    given = {"pattern": pattern(), "backend": backend, "return_lse": True, "scale": 0.7}

    def slope(logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return logits + slopes[h] * (j - i)

    everything = ({"softcap": 3.0, "score": slope, "sinks": sinks}, {"softcap": 3.0, "bias": bias, "sinks": sinks})
    one_by_one = (({}, {}), ({"softcap": 3.0}, {"softcap": 3.0}), ({"sinks": sinks}, {"sinks": sinks}))
    for ours, theirs in (everything, *one_by_one) if backend == "reference" else (everything,):
        out, lse = attend(q, k, v, **given, **ours)
        expected = naive(q, k, v, seen, scale=0.7, **theirs)
        torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, expected[1], rtol=0, atol=1e-12)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_gets_zeros(backend: str, dtype: torch.dtype) -> None:
    if backend == "flex" and dtype == torch.float32:
        pytest.skip("uncompiled flex takes half a second to trace")
    q, k, v = qkv(n=6, dtype=dtype)
    pattern = P.causal() & ~P.sliding_window(3)  # the first three see nothing
    out = attend(q, k, v, pattern=pattern, backend=backend)
    assert (out[:, :, :3] == 0).all() and out.isfinite().all() and (out[:, :, 3:] != 0).any(-1).all()
    if backend != "sdpa":
        out, lse = attend(q, k, v, pattern=pattern, backend=backend, return_lse=True)
        assert (lse[:, :, :3] == -torch.inf).all() and lse[:, :, 3:].isfinite().all()
        assert lse.dtype == torch.float32 and out.dtype == dtype
        sinks = torch.arange(4.0)
        out, lse = attend(q, k, v, pattern=pattern, sinks=sinks, backend=backend, return_lse=True)
        assert (out[:, :, :3] == 0).all() and torch.equal(lse[:, :, :3], sinks[None, :, None].expand(2, 4, 3))
    empty = attend(q, k, v, kv_lengths=torch.tensor([[0, 2], [6, 0]]), backend=backend)
    assert (empty[0, :2] == 0).all() and (empty[1, 2:] == 0).all() and (empty[0, 2:] != 0).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_strips_and_cropped_keys_change_nothing(backend: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(n=33))
    pattern, _ = CASES[case]

    def results() -> list[Tensor]:
        out = attend(q, k, v, pattern=pattern(), backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    whole = results()
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 4 * 2 * 33 * 5)
    monkeypatch.setattr(strips, "_KEY_BLOCK", 4)
    monkeypatch.setattr(strips, "_WORTH_CROPPING", 0)
    monkeypatch.setattr(strips, "_TALLEST", 3)
    for a, b in zip(results(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_strips_see_only_the_keys_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 1 << 14)
    shown: list[tuple[int, int]] = []

    def watch(logits: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shown.append((logits.shape[2], logits.shape[3]))
        return logits

    q, k, v = qkv(batch=1, heads=1, kv_heads=1, n=4096, dtype=torch.float32)
    attend(q[:, :, -64:], k, v, pattern=P.causal() & P.sliding_window(100), score=watch)
    assert len(shown) == 16 and all(n == 4 and m <= 256 for n, m in shown)
    shown.clear()  # the sinks are far from the window, and what lies between is left out
    attend(q[:, :, -1:], k, v, pattern=P.causal() & (P.sliding_window(100) | P.attention_sink(4)), score=watch)
    assert shown == [(1, 256)]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_future_changes_nothing_before_it(backend: str) -> None:
    q, k, v = qkv(n=40, dtype=torch.float32)
    pattern = P.causal() & (P.sliding_window(9) | P.attention_sink(2))
    before = attend(q, k, v, pattern=pattern, backend=backend)
    later_k, later_v = k.clone(), v.clone()
    later_k[:, :, 25:], later_v[:, :, 25:] = 7.0, -9.0
    after = attend(q, later_k, later_v, pattern=pattern, backend=backend)
    assert torch.equal(before[:, :, :25], after[:, :, :25]) and not torch.equal(before[:, :, 25:], after[:, :, 25:])


@every_backend
def test_bfloat16_is_no_worse_than_rounding_every_step(backend: str) -> None:
    q, k, v = qkv(n=64, width=32, value_width=32, dtype=torch.bfloat16)
    seen = torch.ones(64, 64, dtype=torch.bool).tril()
    truth = naive(q, k, v, seen)[0]
    logits = (q @ k.repeat_interleave(2, 1).mT * 32**-0.5).masked_fill(~seen, -torch.inf)
    rounded = logits.softmax(-1) @ v.repeat_interleave(2, 1)
    out = attend(q, k, v, pattern=P.causal(), backend=backend)
    assert out.dtype == torch.bfloat16
    assert (out - truth).abs().max() <= (rounded - truth).abs().max()
    assert (out - truth).square().mean() <= (rounded - truth).square().mean()


def test_a_normalizer_of_ones_own() -> None:
    """Squared positive logits, normalised over what is visible."""
    q, k, v = qkv(n=11)

    def normalizer(logits: Tensor, visible: Tensor) -> Tensor:
        positive = logits.relu().square() * visible
        return positive / positive.sum(-1, keepdim=True).clamp(min=1e-9)

    out = attend(q, k, v, pattern=P.causal(), normalizer=normalizer)
    for h in range(4):
        for i in range(11):
            raw = (k[1, h // 2, : i + 1] @ q[1, h, i] * 8**-0.5).clamp(min=0) ** 2
            expected = (raw / raw.sum().clamp(min=1e-9)) @ v[1, h // 2, : i + 1]
            torch.testing.assert_close(out[1, h, i], expected, rtol=0, atol=1e-12)
