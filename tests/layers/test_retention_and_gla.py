"""RetNet and gated linear attention: their sizes, and the one as the other with a constant gate."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError
from regard.layers.gated_linear_attention import GatedLinearAttention
from regard.layers.retnet import RetNet, retention_log_decay


def test_the_decays_of_retention() -> None:
    decay = retention_log_decay(8, like=torch.zeros(1, dtype=torch.float64))
    want = [1 - 2.0 ** (-5 - h) for h in range(8)]
    assert decay.exp().tolist() == pytest.approx(want, abs=1e-15)
    assert retention_log_decay(2, like=torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


def test_gla_with_a_constant_gate_is_retnet_without_rotation() -> None:
    gla = GatedLinearAttention(8, 2, key_dim=3, value_dim=5, decay_temperature=2.0, chunk_size=4).double()
    retnet = RetNet(8, 2, key_dim=3, value_dim=5, rotary=False, chunk_size=4).double()
    for name in ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "norm"):
        getattr(gla, name).load_state_dict(getattr(retnet, name).state_dict())
    gamma = torch.tensor([1 - 2**-5, 1 - 2**-6], dtype=torch.float64)
    gla.decay_proj[1].weight.data.zero_()
    gla.decay_proj[1].bias.data = torch.logit(gamma**2).repeat_interleave(3)  # σ(b)^{1/τ} = γ
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    torch.testing.assert_close(gla(x).out, retnet(x).out, rtol=0, atol=1e-11)


def test_states_are_as_large_as_the_study_says() -> None:
    x = torch.randn(1, 3, 16)
    assert RetNet(16, 2)(x).state.inner.s.numel() == 2 * 16**2 // 2
    assert GatedLinearAttention(16, 2)(x).state.inner.s.numel() == 16**2 // (2 * 2)


def test_positions_count_real_tokens_only_and_go_on_from_call_to_call() -> None:
    layer = RetNet(8, 2, chunk_size=4).double()
    x, real = (
        torch.randn(1, 9, 8, dtype=torch.float64),
        torch.tensor([[False, True, True, False, True, True, False, True, True]]),
    )
    alone = layer(x[:, real[0]]).out
    torch.testing.assert_close(layer(x, key_padding=real).out[real][None], alone, rtol=0, atol=1e-12)
    first = layer(x[:, :4], key_padding=real[:, :4])
    assert first.state.seen.tolist() == [2]
    second = layer(x[:, 4:], key_padding=real[:, 4:], state=first.state)
    torch.testing.assert_close(torch.cat([first.out, second.out], 1)[real][None], alone, rtol=0, atol=1e-12)


def test_an_odd_key_cannot_be_rotated() -> None:
    with pytest.raises(ArgumentError, match=r"^key_dim: got 3; allowed: an even number"):
        RetNet(8, 2, key_dim=3)
    with pytest.raises(ArgumentError, match=r"^heads: got 3; allowed: a divisor of 1/2 of dim=16, or give key_dim"):
        GatedLinearAttention(16, 3)
