"""The Lightning Attention-2 layer: its presets, its norm, its state."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.layers.lightning_attention_2 import LightningAttention2Layer
from regard.patterns import causal


def test_the_papers_preset_does_not_see_the_scale_of_the_values_and_the_norm_has_no_gain() -> None:
    layer = LightningAttention2Layer(16, 4, preset="tnl-paper").double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    layer.norm.eps = 0.0
    out = layer(x).out
    layer.v_proj.weight.data *= 7
    torch.testing.assert_close(layer(x).out, out, rtol=0, atol=1e-12)
    norms = layer.norm(torch.randn(5, 16, dtype=torch.float64)).norm(dim=-1)
    torch.testing.assert_close(norms, torch.full((5,), 4.0, dtype=torch.float64))
    assert not list(layer.norm.parameters())


def test_the_presets_differ_where_the_sources_do() -> None:
    code = LightningAttention2Layer(16, 4, layer=1, layers=3)
    paper = LightningAttention2Layer(16, 4, preset="tnl-paper", layer=1, layers=3)
    assert code.mixer.log_decay == pytest.approx([-(4.0**-h) * (0.5 + 1e-5) for h in (1, 2, 3, 4)])
    assert paper.mixer.log_decay == pytest.approx([-2 * h * 2 / 3 for h in (1, 2, 3, 4)])
    assert isinstance(code.norm, torch.nn.LayerNorm) and isinstance(paper.gate, torch.nn.Linear)


@pytest.mark.parametrize("preset", ["tnl-code", "tnl-paper"])
def test_both_presets_decode_as_they_run(preset) -> None:
    layer = LightningAttention2Layer(16, 4, preset=preset, chunk_size=4).double()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    _, state, _ = layer(x[:, :10])
    torch.testing.assert_close(layer(x[:, 10:], state=state).out, layer(x).out[:, 10:], rtol=0, atol=1e-12)


def test_the_state_is_float32_constant_in_length_and_free_of_the_chunk_size() -> None:
    x = torch.randn(2, 70, 16).bfloat16()
    states = []
    for chunk_size in (8, 64):
        torch.manual_seed(0)
        layer = LightningAttention2Layer(16, 4, chunk_size=chunk_size).bfloat16()
        states.append(layer(x).state.inner.s)
        assert states[-1].shape == layer(x[:, :3]).state.inner.s.shape == (2, 4, 4, 4)
        assert states[-1].dtype == torch.float32
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def test_what_it_does_not_take() -> None:
    layer, x = LightningAttention2Layer(16, 4), torch.randn(1, 5, 16)
    assert torch.equal(layer(x, pattern=causal()).out, layer(x).out)
    with pytest.raises(UnsupportedError, match="lightning-attention-2 takes no context"):
        layer(x, x)
    with pytest.raises(UnknownNameError, match="did you mean tnl-code"):
        LightningAttention2Layer(16, 4, preset="tnl-cod")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^heads: got 3"):
        LightningAttention2Layer(16, 3)
