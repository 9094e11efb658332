"""TNL's and TransNormerLLM's mixers: rotation in the first layer only, going on across states; the block."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError
from regard.layers.lightning_attention import LightningAttention
from regard.layers.lightning_attention_2 import LightningAttention2Layer
from regard.layers.transnormerllm import SGLU, SimpleRMSNorm, TransNormerBlock, TransNormerLLM


@pytest.mark.parametrize("preset", ["tnl-code", "tnl-paper"])
def test_only_the_first_layer_turns_and_the_others_are_lightning_attention_2(preset) -> None:
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    for layer in (0, 1):
        turned = LightningAttention(16, 4, preset=preset, layer=layer, layers=3).double()
        plain = LightningAttention2Layer(16, 4, preset=preset, layer=layer, layers=3).double()
        missing = plain.load_state_dict(turned.state_dict(), strict=False)
        assert missing.unexpected_keys == (["theta"] if layer == 0 else [])
        same = torch.allclose(turned(x).out, plain(x).out, rtol=0, atol=1e-12)
        assert same == (layer == 1)
        if turned.theta is not None:
            turned.theta.data[:] = 0
            torch.testing.assert_close(turned(x).out, plain(x).out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [LightningAttention, TransNormerLLM])
def test_the_rotation_goes_on_across_states_rows_of_any_length(make) -> None:
    layer, x = make(16, 4, layers=4, chunk_size=4).double(), torch.randn(2, 15, 16, dtype=torch.float64)
    real = torch.arange(15)[None] >= torch.tensor([[0], [4]])
    want, outs, state = layer(x, key_padding=real).out, [], None
    for start, stop in ((0, 6), (6, 7), (7, 15)):
        out, state, _ = layer(x[:, start:stop], key_padding=real[:, start:stop], state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-12)
    assert state.seen.tolist() == [15, 11]
    far = state._replace(seen=state.seen + 100)  # the keys held were turned by other positions
    assert not torch.allclose(layer(x[:, :1], state=far).out, layer(x[:, :1], state=state).out)


def test_the_angles_learn_and_the_first_layers_state_is_twice_as_large() -> None:
    layer = LightningAttention(16, 4)
    out, state, _ = layer(torch.randn(2, 9, 16))
    out.square().sum().backward()
    assert layer.theta.grad.abs().max() > 0 and state.inner.s.shape == (2, 4, 8, 4)
    assert LightningAttention(16, 4, layer=1, layers=2)(torch.randn(2, 9, 16)).state.inner.s.shape == (2, 4, 4, 4)


def test_transnormerllm_is_the_papers_preset() -> None:
    layer, tnl = (m.double() for m in (TransNormerLLM(16, 4), LightningAttention(16, 4, preset="tnl-paper")))
    tnl.load_state_dict(layer.state_dict())
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    assert torch.equal(layer(x).out, tnl(x).out)
    layer.norm.eps = 0.0
    out = layer(x).out
    layer.v_proj.weight.data *= 7  # the norm stands where softmax has its denominator
    torch.testing.assert_close(layer(x).out, out, rtol=0, atol=1e-12)


def test_simple_rms_norm_puts_everything_on_one_sphere_and_has_no_gain() -> None:
    norm = SimpleRMSNorm(16, eps=0.0)
    x = torch.randn(5, 16, dtype=torch.float64) * torch.logspace(-6, 6, 5, dtype=torch.float64)[:, None]
    torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((5,), 4.0, dtype=torch.float64))
    assert not list(norm.parameters())


def test_the_block_is_two_residuals_and_decodes() -> None:
    block = TransNormerBlock(16, 4, layer=0, layers=2).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    unit = x * 4 / (x.square().sum(-1, keepdim=True) + 16e-6).sqrt()
    y = x + block.mixer(unit).out
    z = y * 4 / (y.square().sum(-1, keepdim=True) + 16e-6).sqrt()
    channels = block.channels
    want = y + (z @ channels.v_proj.weight.T * (z @ channels.u_proj.weight.T)) @ channels.o_proj.weight.T
    torch.testing.assert_close(block(x).out, want, rtol=0, atol=1e-12)
    _, state, _ = block(x[:, :8])
    torch.testing.assert_close(block(x[:, 8:], state=state).out, want[:, 8:], rtol=0, atol=1e-12)
    real = torch.arange(9)[None].expand(2, -1) >= 2
    out = block(x, key_padding=real).out
    torch.testing.assert_close(out[:, 2:], block(x[:, 2:]).out, rtol=0, atol=1e-12)
    assert (out[:, :2] == 0).all()


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"^width: got 0"):
        SGLU(8, 0)
    with pytest.raises(ArgumentError, match=r"^layer: got 3"):
        TransNormerLLM(16, 4, layer=3, layers=3)


@pytest.mark.parametrize("kind", [LightningAttention, LightningAttention2Layer, TransNormerLLM])
def test_it_is_made_without_memory_and_in_the_default_dtype(kind) -> None:
    with torch.device("meta"):
        empty = kind(16, 4)
    assert all(p.is_meta for p in empty.parameters()) and empty.mixer == kind(16, 4).mixer
    try:
        torch.set_default_dtype(torch.float64)
        assert {p.dtype for p in kind(16, 4).parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)
