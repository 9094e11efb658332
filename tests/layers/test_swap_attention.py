"""Swap attention: the worked window, its identities, and that it mixes space and time jointly."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError, UnsupportedError
from regard.layers import create
from regard.layers.swap_attention import SwapAttention, swap_streams
from regard.patterns import causal, full, sliding_window

EXACT = {"rtol": 0.0, "atol": 1e-12}


def make(**settings: object) -> SwapAttention:
    torch.manual_seed(0)
    layer = create("videofactory-swap-attention", dim=8, heads=2, **{"zero_init": False, **settings}).double()
    assert isinstance(layer, SwapAttention)
    return layer


def streams(n: int) -> torch.Tensor:
    return torch.randn(2, 2, n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_worked_window() -> None:
    layer = make(layout=(2, 4, 4), window=(2, 2, 2))
    x, context = streams(32)
    context.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x, context).out[:, 5].sum(), context)
    assert grad[0].any(-1).nonzero()[:, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]


def test_one_window_and_windows_of_one() -> None:
    x, context = streams(12)
    dense = make()(x, context).out
    torch.testing.assert_close(make(layout=(2, 2, 3), window=(2, 2, 3))(x, context).out, dense, **EXACT)
    alone = make(layout=(2, 2, 3), window=(1, 1, 1))
    torch.testing.assert_close(
        alone(x, context).out, x + alone.o_proj(alone.v_proj(alone.context_norm(context))), **EXACT
    )


def test_it_starts_as_nothing() -> None:
    x, context = streams(12)
    assert torch.equal(SwapAttention(8, 2).double()(x, context).out, x)


def test_whose_turn_it_is() -> None:
    layer = make(layout=(2, 2, 3))
    spatial, temporal = streams(12)
    even, odd = swap_streams(layer, spatial, temporal, 0), swap_streams(layer, temporal, spatial, 1)
    assert torch.equal(even[0], odd[1]) and torch.equal(even[1], odd[0]) and torch.equal(even[1], temporal)
    torch.testing.assert_close(layer(spatial, spatial).out, layer(spatial).out, **EXACT)


def test_space_and_time_at_once() -> None:
    """A token of another frame and another place inside the window is reached in one layer."""
    layer = make(layout=(2, 4, 4), window=(2, 2, 2))
    x = streams(32)[0].requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).out[:, 0].sum(), x)
    assert grad[0, 16 + 5].any() and not grad[0, 2].any()


def test_ragged_borders_and_missing_places() -> None:
    """A window that does not divide the map is cut; masked places keep the others where they are."""
    layer = make(layout=(1, 3, 5), window=(1, 2, 3), bias=True)
    torch.nn.init.normal_(layer.table)
    x, context = streams(15)
    real = torch.ones(2, 15, dtype=torch.bool)
    real[1, [0, 7]] = False
    out = layer(x, context, key_padding=real).out
    torch.testing.assert_close(out[0], layer(x, context).out[0], **EXACT)
    blind = layer(x[1:, [10]] * 0 + x[1:], context[1:].masked_fill(~real[1:, :, None], 1e3), key_padding=real[1:]).out
    torch.testing.assert_close(out[1:], blind, **EXACT)
    assert (layer(x, key_padding=real).out[1, [0, 7]] == 0).all()


def test_the_bias_is_one_number_per_relative_place() -> None:
    layer = make(layout=(2, 2, 4), window=(2, 2, 2), bias=True)
    assert layer.table is not None and layer.table.shape == (2, 3, 3, 3)
    torch.nn.init.normal_(layer.table)
    x, context = streams(16)
    got = layer(x, context).out
    grad_table = torch.autograd.grad(got.sin().sum(), layer.table)[0]

    places = torch.tensor([(t, y, z) for t in range(2) for y in range(2) for z in range(4)])
    same = (places[:, None] // 2 == places // 2).all(-1)
    apart = (places - places[:, None]).clamp(-1, 1) + 1
    q, k, v = (
        p(n).view(2, 16, 2, 4).transpose(1, 2)
        for p, n in (
            (layer.q_proj, layer.x_norm(x)),
            (layer.k_proj, layer.context_norm(context)),
            (layer.v_proj, layer.context_norm(context)),
        )
    )
    logits = q @ k.mT / 2 + layer.table[:, apart[..., 0], apart[..., 1], apart[..., 2]]
    want = logits.masked_fill(~same, -torch.inf).softmax(-1) @ v
    want = x + layer.o_proj(want.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, want, **EXACT)
    torch.testing.assert_close(grad_table, torch.autograd.grad(want.sin().sum(), layer.table)[0], **EXACT)


def test_with_norms_everybody_is_seen_as_the_pattern_says() -> None:
    """A LayerNorm does not see a shift of all channels, so the change is of one."""
    layer, x = make(), streams(12)[0]
    changed = x.clone()
    changed[:, 2, 0] += 1
    for pattern, seen in ((None, range(12)), (causal() & sliding_window(3), (2, 3, 4))):
        moved = (layer(changed, pattern=pattern).out - layer(x, pattern=pattern).out).abs().amax((0, 2)) > 1e-9
        assert moved.nonzero()[:, 0].tolist() == list(seen)


def test_default_window() -> None:
    layer = SwapAttention(8, 2, layout=(6, 16, 5))
    assert layer.window == (6, 8, 5)
    assert torch.equal(
        make(layout=(2, 2, 3))(streams(12)[0], pattern=causal()).out[:, 0],
        make()(streams(12)[0], pattern=causal()).out[:, 0],
    )


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("heads", lambda: SwapAttention(8, 3)),
        ("window", lambda: SwapAttention(8, 2, window=(1, 1, 1))),
        ("bias", lambda: SwapAttention(8, 2, bias=True)),
        ("layout", lambda: SwapAttention(8, 2, layout=(2, 2))),
        ("zero_init", lambda: SwapAttention(8, 2, zero_init=0)),
        ("norm", lambda: SwapAttention(8, 2, norm="layer")),
        ("window", lambda: SwapAttention(8, 2, layout=(2, 2, 3), window=(0, 1, 1))),
        ("x", lambda: make(layout=(2, 2, 3))(streams(11)[0])),
        ("context", lambda: make(layout=(2, 2, 3))(streams(12)[0], streams(13)[0])),
    ],
)
def test_bad_input(argument: str, call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        call()


def test_no_state() -> None:
    with pytest.raises(UnsupportedError, match="videofactory-swap-attention takes no state"):
        make()(streams(3)[0], state=1)


@pytest.mark.parametrize("bias", [False, True])
def test_windows_cut_out_are_the_windows_as_a_mask(bias: bool) -> None:
    """A pattern that allows everything takes the other way; outputs and gradients are those of the cut windows."""
    layer = make(layout=(4, 6, 4), window=(2, 3, 4), bias=bias)
    if layer.table is not None:
        torch.nn.init.normal_(layer.table)
    x, context = streams(96).requires_grad_()
    cut, masked = layer(x, context).out, layer(x, context, pattern=full()).out
    torch.testing.assert_close(cut, masked, **EXACT)
    wanted = (x, context, *layer.parameters())
    for one, other in zip(*(torch.autograd.grad(out.sin().sum(), wanted) for out in (cut, masked)), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
