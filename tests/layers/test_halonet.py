"""HaloNet's layer: gathered = dense, downsampling, borders, and what shifts of the image do."""

from __future__ import annotations

import pytest
import torch
from tests.patterns.test_block_map import Largest

from regard.attend import attend
from regard.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.layers import create
from regard.layers.halonet import HaloAttention
from regard.patterns import sliding_window

EXACT = {"rtol": 0.0, "atol": 1e-12}


def make(**settings: object) -> HaloAttention:
    torch.manual_seed(0)
    layer = create("halonet", dim=8, heads=2, **{"layout": (5, 6), "block": 2, "halo": 1, **settings}).double()
    assert isinstance(layer, HaloAttention)
    return layer


def image(*size: int) -> torch.Tensor:
    return torch.randn(2, size[0] * size[1], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("block", "halo", "relative"), [(1, 1, True), (2, 0, True), (3, 2, True), (4, 1, False), (2, 7, True), (8, 3, True)]
)
def test_gathered_is_dense(block: int, halo: int, relative: bool) -> None:
    layer = make(block=block, halo=halo, relative=relative)
    x = image(5, 6)
    q, k, v = layer.project(x)
    score = layer.relative_score(q) if relative else None
    flat = [t.flatten(2, 3) for t in (q, k, v)]
    want = layer.o_proj(attend(*flat, pattern=layer.dense_pattern(), score=score, scale=1.0).transpose(1, 2).flatten(2))
    got = layer(x).out
    torch.testing.assert_close(got, want, **EXACT)
    for p in layer.parameters():
        one, other = (torch.autograd.grad(t.sin().sum(), p, retain_graph=True)[0] for t in (got, want))
        torch.testing.assert_close(one, other, **EXACT)


def test_flex_with_the_relative_logits_as_its_score() -> None:
    layer = make().float()
    x = image(5, 6).float()
    q, k, v = (t.detach() for t in layer.project(x))
    flat, score = (t.flatten(2, 3) for t in (q, k, v)), layer.relative_score(q)
    with torch.no_grad():
        out = attend(*flat, pattern=layer.dense_pattern(), score=score, scale=1.0, backend="flex")
        torch.testing.assert_close(layer.o_proj(out.transpose(1, 2).flatten(2)), layer(x).out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("layout", "stride"), [((4, 8), 2), ((5, 6), 2), ((7, 9), 4)])
def test_downsampling_is_the_full_layer_at_fewer_places(layout: tuple[int, int], stride: int) -> None:
    full, fewer = make(layout=layout, block=4), make(layout=layout, block=4, stride=stride)
    x = image(*layout)
    want = full(x).out.unflatten(1, layout)[:, ::stride, ::stride].flatten(1, 2)
    torch.testing.assert_close(fewer(x).out, want, **EXACT)


def test_only_shifts_by_blocks_commute() -> None:
    layer = make(layout=(12, 12), block=3, halo=1)
    x = image(12, 12).unflatten(1, (12, 12))

    def rolled(by: int) -> torch.Tensor:
        return layer(x.roll(by, 1).flatten(1, 2)).out.unflatten(1, (12, 12)).roll(-by, 1)

    inner, out = slice(3, 6), rolled(0)
    torch.testing.assert_close(rolled(3)[:, inner], out[:, inner], **EXACT)
    assert (rolled(1)[:, inner] - out[:, inner]).abs().max() > 1e-3


def test_a_border_of_zeros_takes_its_share() -> None:
    """A padded key has k = 0 and v = 0 and keeps its relative logit: written out for one corner."""
    layer = make(layout=(4, 4), border="zero")
    masked = make(layout=(4, 4))
    x = image(4, 4)
    q, k, v = layer.project(x)
    logits, values = [], []
    for dy in range(-1, 3):
        for dx in range(-1, 3):
            inside = dy >= 0 and dx >= 0
            key, value = (t[:, :, dy, dx] if inside else torch.zeros_like(t[:, :, 0, 0]) for t in (k, v))
            logits.append((q[:, :, 0, 0] * (key + layer.row[dy + 2] + layer.col[dx + 2])).sum(-1))
            values.append(value)
    weights = torch.stack(logits, -1).softmax(-1)
    want = layer.o_proj((weights[..., None] * torch.stack(values, 2)).sum(2).flatten(1))
    torch.testing.assert_close(layer(x).out[:, 0], want, **EXACT)
    assert (masked(x).out[:, 0] - want).abs().max() > 1e-3
    inner = [5, 6, 9, 10]  # their window lies in the map only if it is the middle block; with block 2 none does
    assert (masked(x).out - layer(x).out)[:, inner].abs().max() > 1e-3
    middle = [make(layout=(6, 6), border=b)(image(6, 6)).out[:, [14, 15, 20, 21]] for b in ("mask", "zero")]
    torch.testing.assert_close(*middle, **EXACT)


def test_places_that_are_missing() -> None:
    for border in ("mask", "zero"):
        layer = make(border=border)
        x = image(5, 6)
        real = torch.ones(2, 30, dtype=torch.bool)
        real[1, [0, 8, 29]] = False
        out = layer(x, key_padding=real).out
        torch.testing.assert_close(out[0], layer(x).out[0], **EXACT)
        assert (out[1, [0, 8, 29]] == 0).all()
        junk = torch.where(real[..., None], x, 1e6)
        torch.testing.assert_close(layer(junk, key_padding=real).out, out, **EXACT)
        assert (out[1, 1] - layer(x).out[1, 1]).abs().max() > 1e-6


def test_memory_is_that_of_windows() -> None:
    """96 × 96 places: a whole map would be 324 MiB; nothing is larger than the logits of all windows."""
    layer = HaloAttention(8, 1, layout=(96, 96), block=8, halo=3)
    x = torch.randn(1, 96 * 96, 8, requires_grad=True)
    with Largest() as largest:
        layer(x).out.sum().backward()
    assert largest.bytes <= 96 * 96 * 14 * 14 * 4
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("layout", lambda: HaloAttention(8, 2)),
        ("layout", lambda: HaloAttention(8, 2, layout=(4,))),
        ("block", lambda: make(block=0)),
        ("halo", lambda: make(halo=-1)),
        ("stride", lambda: make(block=4, stride=3)),
        ("heads", lambda: HaloAttention(8, 3, layout=(4, 4))),
        ("head_dim", lambda: make(head_dim=0)),
        ("relative", lambda: make(relative=2)),
        ("x", lambda: make()(image(5, 5))),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()


def test_what_it_does_not_do() -> None:
    with pytest.raises(UnknownNameError, match="border: got 'zeros'; allowed: did you mean zero"):
        make(border="zeros")
    with pytest.raises(UnsupportedError, match="halonet takes no pattern but its own"):
        make()(image(5, 6), pattern=sliding_window(3))
