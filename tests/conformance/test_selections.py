"""What every registered selection must pass: `example()` gives (a small one, one whose budget is everything)."""

from __future__ import annotations

from typing import Any

import torch
from tests.conformance.cases import check
from torch import Tensor

from regard.attend import attend
from regard.patterns import Pattern, causal
from regard.registry import lookup
from regard.selection import attend_selected

N, HQ, HKV, D = 30, 4, 2, 8
EXACT = {"rtol": 0.0, "atol": 1e-10}


def example(key: str) -> tuple[Any, Any]:
    """The small one and the one that selects everything."""
    made = lookup("selection", key).example
    assert made is not None, f"selection {key} has to give an example"
    return made()


def pattern(key: str) -> Pattern | None:
    """The pattern the selection is for."""
    return causal() if lookup("selection", key).settings["causal"] else None


def make(n: int = N, heads: int = HKV) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, D, generator=g, dtype=torch.float64) for h in (HQ, heads, heads))
    return q, k, v


@check("full budget = dense", kind="selection")
def test_the_full_budget_is_dense_attention(key: str) -> None:
    small, everything = example(key)
    q, k, v = make()
    dense = attend(q, k, v, pattern=pattern(key))
    got = attend_selected(q, k, v, everything.select(q, k), pattern=pattern(key))
    torch.testing.assert_close(got, dense, **EXACT)
    less = attend_selected(q, k, v, small.select(q, k), pattern=pattern(key))
    assert (less - dense).abs().max() > 1e-3, "the small example must leave something out"


@check("causal", kind="selection")
def test_the_future_changes_nothing(key: str) -> None:
    """A choice made from a whole block of queries is tested with the index held fixed."""
    small, _ = example(key)
    q, k, v = make()
    index = small.select(q, k)
    out = attend_selected(q, k, v, index, pattern=causal())
    t = N // 2
    later = tuple(torch.cat([x[:, :, :t], 9 * x[:, :, t:].flip(-1)], 2) for x in (q, k, v))
    again = small.select(*later[:2]) if index.query_block == 1 else index
    assert torch.equal(attend_selected(*later, again, pattern=causal())[:, :, :t], out[:, :, :t])


@check("padding", kind="selection")
def test_a_padded_batch_is_its_rows(key: str) -> None:
    small, _ = example(key)
    q, k, v = make()
    for pad in (slice(0, 7), slice(N - 7, N)):
        real = torch.ones(2, N, dtype=torch.bool)
        real[1, pad] = False
        index = small.select(q, k, key_padding=real)
        out = attend_selected(q, k, v, index, pattern=pattern(key), key_padding=real)
        for b in range(2):
            row = [x[b : b + 1, :, real[b]] for x in (q, k, v)]
            alone = attend_selected(*row, small.select(*row[:2]), pattern=pattern(key))
            torch.testing.assert_close(out[b : b + 1, :, real[b]], alone, **EXACT)


@check("rows apart", kind="selection")
def test_batch_rows_do_not_influence_each_other(key: str) -> None:
    small, _ = example(key)
    q, k, _ = make()
    index = small.select(q, k)
    other = small.select(*(torch.cat([x[:1], -3 * x[1:]]) for x in (q, k)))
    blocks = -(-N // index.key_block)
    assert torch.equal(index.mask(blocks)[0], other.mask(blocks)[0])


@check("any length", kind="selection")
def test_lengths(key: str) -> None:
    small, _ = example(key)
    for n in (1, 7, 63):
        q, k, v = make(n)
        out = attend_selected(q, k, v, small.select(q, k), pattern=pattern(key))
        assert out.shape == q.shape and out.isfinite().all()
