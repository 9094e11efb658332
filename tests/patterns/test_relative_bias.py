"""The bias of neighborhood attention: one learned number for each relative place, whatever the border does."""

from __future__ import annotations

import pytest
import torch

from regard.attend import attend
from regard.errors import ArgumentError
from regard.patterns import neighborhood
from regard.scores.relative_bias import relative_bias


@pytest.mark.parametrize("dilation", [(1, 1), (2, 1)])
def test_it_is_indexed_by_the_unclamped_distance_within_a_class(dilation: tuple[int, int]) -> None:
    layout, window = (6, 5), (3, 4)
    p = neighborhood(layout, window, dilation=dilation)
    table = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 30, 4, dtype=torch.float64)
    got = attend(q, k, v, pattern=p, score=relative_bias(table, layout, dilation))

    allowed, rows, used = p.dense(30)[0, 0], [], set()
    for i in range(30):
        keys = allowed[i].nonzero()[:, 0].tolist()
        logits = []
        for j in keys:
            dy, dx = j // 5 // dilation[0] - i // 5 // dilation[0], j % 5 - i % 5
            used.add((dy, dx))
            logits.append((q[0, :, i] * k[0, :, j]).sum(-1) / 2 + table[:, dy + 2, dx + 3])
        rows.append((torch.stack(logits, -1).softmax(-1)[:, None] @ v[0][:, keys])[:, 0])
    want = torch.stack(rows, 1)[None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert {dy for dy, _ in used} == set(range(-2, 3)) and {dx for _, dx in used} == set(range(-3, 4))
    one, other = (torch.autograd.grad(out.sin().sum(), table)[0] for out in (got, want))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("table", lambda: relative_bias(torch.zeros(2, 5), (4, 4))),
        ("table", lambda: relative_bias(torch.zeros(2, 4), (8,))),
        ("dilation", lambda: relative_bias(torch.zeros(2, 5), (8,), (1, 1))),
        ("dilation", lambda: relative_bias(torch.zeros(2, 5), (8,), 0)),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()
