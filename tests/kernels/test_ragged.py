"""Ragged lanes, group by group, against the definition and against `attend` on the padded cache."""

from __future__ import annotations

import pytest
import torch
from tests.naive_attention import naive
from torch import Tensor

from regard.attend import attend
from regard.errors import ArgumentError
from regard.kernels.ragged import LaneGroup, ragged_attend

B, HKV, R, N, D, DV, TOP = 2, 3, 2, 3, 8, 5, 16
LENGTHS = torch.tensor([[16, 4, 4], [7, 0, 11]])


def cache(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(B, HKV * R, N, D).to(dtype)
    k, v = torch.randn(B, HKV, TOP, D).to(dtype), torch.randn(B, HKV, TOP, DV).to(dtype)
    gone = torch.arange(TOP) >= LENGTHS[..., None]
    return q, k.masked_fill(gone[..., None], torch.nan), v.masked_fill(gone[..., None], torch.nan)


def group_of(k: Tensor, v: Tensor, lanes: list[tuple[int, int]], capacity: int, complete: bool = False) -> LaneGroup:
    rows, heads = torch.tensor(lanes).unbind(1)
    lengths = LENGTHS[rows, heads]
    uniform = int(lengths[0]) if bool((lengths == lengths[0]).all()) else None
    positions = torch.arange(capacity).expand(len(lanes), -1)
    held = (k[rows, heads, :capacity].contiguous(), v[rows, heads, :capacity].contiguous())
    return LaneGroup(*held, rows, heads, lengths, positions, uniform, complete)


def layouts(k: Tensor, v: Tensor) -> dict[str, list[LaneGroup]]:
    every = [(b, h) for b in range(B) for h in range(HKV)]
    return {
        "one group": [group_of(k, v, every, TOP, complete=True)],
        "by capacity": [
            group_of(k, v, [(0, 0)], 16),
            group_of(k, v, [(1, 2), (1, 0)], 12),
            group_of(k, v, [(0, 1), (0, 2)], 8),
            group_of(k, v, [(1, 1)], 0),
        ],
        "each alone": [group_of(k, v, [lane], TOP) for lane in reversed(every)],
    }


@pytest.mark.parametrize("layout", ["one group", "by capacity", "each alone"])
@pytest.mark.parametrize("masked", [None, "alike", "by query"])
@pytest.mark.parametrize("extras", ["none", "lse", "softcap", "sinks", "all"])
def test_equals_the_definition(layout: str, masked: str | None, extras: str) -> None:
    q, k, v = cache()
    sinks = torch.randn(HKV * R, dtype=torch.float64) if extras in ("sinks", "all") else None
    softcap = 1.5 if extras in ("softcap", "all") else None
    keep = torch.rand(B, HKV, N if masked == "by query" else 1, TOP) < 0.6

    def visible(group: LaneGroup) -> Tensor:
        return keep[group.rows, group.heads, :, : group.k.shape[1]]

    got = ragged_attend(
        q, layouts(k, v)[layout], scale=0.3, softcap=softcap, sinks=sinks, visible=visible if masked else None,
        return_lse=extras in ("lse", "all"),
    )  # fmt: skip
    seen = (torch.arange(TOP) < LENGTHS[..., None])[:, :, None]
    seen = (seen & keep if masked else seen).repeat_interleave(R, 1)
    out, lse = naive(q, k, v, seen, scale=0.3, softcap=softcap, sinks=sinks)
    if isinstance(got, tuple):
        torch.testing.assert_close(got[1], lse, rtol=0, atol=1e-12)
        got = got[0]
    torch.testing.assert_close(got, out, rtol=0, atol=1e-12)
    assert (got[1, 2:4] == 0).all()  # the lane that holds nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attend_on_the_padded_cache(dtype: torch.dtype) -> None:
    q, k, v = cache(dtype)
    expected = attend(q, k, v, kv_lengths=LENGTHS, scale=0.3, backend="reference")
    for groups in layouts(k, v).values():
        out = ragged_attend(q, groups, scale=0.3)
        assert out.dtype == dtype
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)


def test_uniform_lanes_are_cut_and_neither_masked_nor_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = cache()
    k, v = k.nan_to_num(), v.nan_to_num()
    k[:, :, 9:], v[:, :, 9:] = torch.nan, torch.nan
    rows, heads = torch.arange(B).repeat_interleave(HKV), torch.arange(HKV).repeat(B)
    flat = (k.view(-1, TOP, D), v.view(-1, TOP, DV))
    lengths = torch.full((B * HKV,), 9)
    group = LaneGroup(*flat, rows, heads, lengths, torch.arange(TOP).expand(B * HKV, -1), 9, True)
    asked: list[tuple[int, bool]] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **given: object) -> Tensor:
        asked.append((k.data_ptr(), given.get("attn_mask") is None))
        return fused(q, k, v, **given)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    out = ragged_attend(q, [group], scale=0.3)
    assert asked == [(flat[0].data_ptr(), True)]
    torch.testing.assert_close(out, naive(q, k, v, torch.arange(TOP) < 9, scale=0.3)[0], rtol=0, atol=1e-12)


def test_gradients() -> None:
    q, k, v = cache()
    q.requires_grad_()
    groups = layouts(k, v)["by capacity"]
    fused = torch.autograd.grad(ragged_attend(q, groups, scale=0.3).square().sum(), q)[0]
    plain = torch.autograd.grad(ragged_attend(q, groups, scale=0.3, return_lse=True)[0].square().sum(), q)[0]
    seen = (torch.arange(TOP) < LENGTHS[..., None])[:, :, None].repeat_interleave(R, 1)
    expected = torch.autograd.grad(naive(q, k, v, seen, scale=0.3)[0].square().sum(), q)[0]
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)


def test_lanes_that_do_not_fit_the_queries() -> None:
    q, k, v = cache()
    for lanes in ([(0, 0)], [(b, h) for b in range(B) for h in range(2)] + [(0, 2), (1, 2), (0, 0), (0, 1)]):
        with pytest.raises(ArgumentError, match="groups"):
            ragged_attend(q, [group_of(k, v, lanes, TOP)], scale=0.3)
