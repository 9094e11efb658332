"""CLEAR's pooled keys: one softmax over the disk, the text and the cells, by definition."""

from __future__ import annotations

import pytest
import torch

from regard.attend import attend
from regard.errors import ArgumentError
from regard.layers.clear_pooling import ClearPooling
from regard.patterns import clear

HEIGHT, WIDTH, TEXT, FACTOR, RADIUS = 4, 6, 3, 2, 2
N = TEXT + HEIGHT * WIDTH


def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, h, N, 8, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))  # type: ignore[return-value]


def test_it_is_one_softmax_over_a_larger_map() -> None:
    layer = ClearPooling((HEIGHT, WIDTH), RADIUS, text=TEXT, factor=FACTOR).double()
    torch.nn.init.uniform_(layer.weight)
    q, k, v = qkv()
    extra = []
    for x in (k, v):
        image = x[:, :, TEXT:].unflatten(2, (HEIGHT, WIDTH))
        cells = [
            sum(layer.weight[a, b] * image[:, :, y + a, z + b] for a in range(FACTOR) for b in range(FACTOR))
            for y in range(0, HEIGHT, FACTOR)
            for z in range(0, WIDTH, FACTOR)
        ]
        extra.append(torch.cat([x, torch.stack(cells, 2)], 2).repeat_interleave(2, 1))
    keys, values = extra
    allowed = torch.cat(
        [clear((HEIGHT, WIDTH), RADIUS, text=TEXT).dense(N)[0, 0], torch.ones(N, 6, dtype=torch.bool)], 1
    )
    allowed[:TEXT, N:] = False
    want = (q @ keys.mT / 8**0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ values
    got = layer(q, k, v)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    leaves = (q, k, v, layer.weight)
    for one, other in zip(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_cell_of_one_token_at_the_start_is_the_token_again() -> None:
    """The table starts at 1 / factor²: with factor 1 the image is simply seen twice, once whole and once by disks."""
    layer = ClearPooling((HEIGHT, WIDTH), 50, factor=1).double()
    q, k, v = (x[:, :, TEXT:] for x in qkv())
    torch.testing.assert_close(layer(q, k, v), attend(q, k, v), rtol=0, atol=1e-12)
    assert ClearPooling((8, 8), 2).weight.tolist() == [[1 / 16] * 4] * 4


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("factor", lambda: ClearPooling((4, 6), 2, factor=4)),
        ("factor", lambda: ClearPooling((4, 6), 2, factor=0)),
        ("layout", lambda: ClearPooling((4, 6, 2), 2)),
        ("radius", lambda: ClearPooling((4, 4), 0)),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()
