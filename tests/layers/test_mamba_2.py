"""Mamba-2 against the loop over its tokens, channel by channel."""

from __future__ import annotations

import torch
from torch.nn.functional import silu, softplus

from regard.layers.mamba_2 import Mamba2


def test_it_is_the_paper_s_loop_from_the_tokens_on() -> None:
    torch.manual_seed(0)
    layer = Mamba2(8, 4, key_dim=3, value_dim=2, groups=2, kernel_size=3, chunk_size=4).double()
    layer.skip.data.normal_()
    x = torch.randn(9, 8, dtype=torch.float64)
    raw, dt = layer.xbc_proj(x), softplus(layer.dt_proj(x) + layer.decay.dt_bias)
    state, out = torch.zeros(4, 3, 2, dtype=torch.float64), []
    for t in range(9):
        window = [raw[t - i] if t >= i else torch.zeros(20, dtype=torch.float64) for i in (2, 1, 0)]
        xbc = silu(sum(w * r for w, r in zip(layer.convolution.weight.T, window, strict=True)) + layer.convolution.bias)
        heads = []
        for h in range(4):
            value, b, c = xbc[2 * h : 2 * h + 2], xbc[8 + 3 * (h // 2) :][:3], xbc[14 + 3 * (h // 2) :][:3]
            rate = torch.exp(-dt[t, h] * layer.decay.a_log[h].exp())
            state[h] = (rate * state[h] + dt[t, h] * torch.outer(b, value)).detach()
            heads.append(c @ state[h] + layer.skip[h] * value)
        y = torch.cat(heads) * silu(layer.z_proj(x[t]))
        groups = [part / (part.square().mean() + 1e-5).sqrt() for part in y.split(4)]
        out.append(layer.o_proj(torch.cat(groups) * layer.norm_weight))
    torch.testing.assert_close(layer(x[None]).out[0], torch.stack(out), rtol=0, atol=1e-12)


def test_its_state_has_128_numbers_per_inner_channel_by_default() -> None:
    layer = Mamba2(16, 2)
    state = layer(torch.randn(1, 5, 16)).state
    assert state.inner.s.shape == (1, 2, 128, 16) and state.windows[0].shape == (1, 3, 2 * 16 + 2 * 128)
    assert (layer.decay.a_log.exp() >= 1).all() and (layer.skip == 1).all()
