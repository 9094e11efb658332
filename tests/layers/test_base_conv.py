"""BaseConv: what each preset computes, how far it sees, what it keeps."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError, UnknownNameError
from regard.layers.base_conv import BaseConv


def test_zoologys_form_by_hand() -> None:
    layer = BaseConv(6, 1, preset="zoology", kernel_size=2).double()
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    h, b = layer.convolution.weight, layer.convolution.bias
    for t in range(5):
        before = x[:, t - 1] if t else torch.zeros_like(x[:, 0])
        want = layer.in_proj(x[:, t]) * (h[:, 1] * x[:, t] + h[:, 0] * before + b) + x[:, t]
        torch.testing.assert_close(layer(x).out[:, t], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["based", "zoology"])
def test_it_sees_as_many_tokens_as_the_kernel_is_long_also_over_a_gap_of_padding(preset) -> None:
    layer = BaseConv(8, 2, preset=preset, kernel_size=4).double()
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (layer(changed).out - layer(x).out).abs().amax((0, 2)) > 0
    assert moved.tolist() == [3 <= t < 7 for t in range(12)]
    real = torch.ones(1, 12, dtype=torch.bool)
    real[:, 5:8] = False
    torch.testing.assert_close(layer(x, key_padding=real).out[real], layer(x[real][None]).out[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("preset", ["based", "zoology"])
def test_decoding_keeps_a_window_and_no_more(preset) -> None:
    layer, x = BaseConv(8, 2, preset=preset).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    want, outs, state = layer(x).out, [], None
    for t in range(9):
        out, state, _ = layer(x[:, t : t + 1], state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-12)
    assert [tuple(w.shape) for w in state.windows] == [(2, 2, 16 if preset == "based" else 8)] and state.inner == ()


@pytest.mark.parametrize("preset", ["based", "zoology"])
def test_a_filter_as_long_as_the_sequence_decodes_and_skips_padding(preset) -> None:
    layer = BaseConv(8, 2, preset=preset, kernel_size=None, max_length=16).double()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    real = torch.rand(2, 13) < 0.6
    want = layer(x, key_padding=real).out
    for b in range(2):
        torch.testing.assert_close(want[b, real[b]], layer(x[b : b + 1, real[b]]).out[0], rtol=0, atol=1e-12)
    outs, state = [], None
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 13)):
        out, state, _ = layer(x[:, start:stop], key_padding=real[:, start:stop], state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-12)


def test_sizes_of_the_release() -> None:
    layer = BaseConv(1024, 16)
    assert layer.in_proj.weight.shape == (4096, 1024) and layer.out_proj.weight.shape == (1024, 2048)
    assert layer.convolution.weight.shape == (2048, 3)


def test_bad_settings_are_named() -> None:
    with pytest.raises(UnknownNameError, match="did you mean zoology"):
        BaseConv(8, 2, preset="zoologi")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^expand: got 1"):
        BaseConv(7, 1, expand=1)
    with pytest.raises(ArgumentError, match=r"^kernel_size: got 0"):
        BaseConv(8, 2, kernel_size=0)


@pytest.mark.parametrize("preset", ["based", "zoology"])
@pytest.mark.parametrize("size", [3, None])
def test_autocast_with_padding_and_calls_without_tokens_or_rows(preset, size) -> None:
    layer, x = BaseConv(8, 2, preset=preset, kernel_size=size), torch.randn(2, 7, 8)
    real = torch.arange(7)[None].expand(2, -1) >= 2
    want = layer(x, key_padding=real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x, key_padding=real).out.float(), want.out, rtol=0.1, atol=0.05)
    for few in (x[:0], x[:, :0], x[:0, :0]):
        for here in (None, torch.ones(few.shape[:2], dtype=torch.bool)):
            assert layer(few, key_padding=here).out.shape == few.shape
    for here in (None, real[:, :0]):
        state = layer(x[:, :0], key_padding=here, state=want.state).state
        assert torch.equal(state.windows[0], want.state.windows[0])
