"""Multi-head attention: what conformance does not ask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError, UnsupportedError
from regard.layers import create, settings_of
from regard.layers.multi_head_attention import KVState, MultiHeadAttention
from regard.layers.rotary import rotate
from regard.patterns import attention_sink, causal, sliding_window

EXACT = {"rtol": 0.0, "atol": 1e-12}


def tokens(n: int = 9) -> Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64)


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(2))
    here, there = (rotate(q, t) @ rotate(k, t).mT for t in (torch.arange(5)[None], 37 + torch.arange(5)[None]))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-10)
    assert not torch.allclose(here, q @ k.mT)


def test_rotation_is_that_of_complex_numbers() -> None:
    x, t = torch.randn(1, 1, 3, 6, dtype=torch.float64), torch.tensor([[0, 2, 5]])
    pairs = torch.complex(x[..., :3], x[..., 3:])
    angles = t[:, None, :, None] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(rotate(x, t), torch.cat([turned.real, turned.imag], -1), **EXACT)


def test_rotary_padding_patterns_and_decoding_hold_together() -> None:
    """Positions are those of real tokens: padded rows, cut anywhere, under a window with sinks, are the rows alone."""
    layer = MultiHeadAttention(16, 4, kv_heads=2, rotary=True).double()
    pattern = causal() & (sliding_window(3) | attention_sink(1))
    x, real = tokens(), torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    alone = layer(x[1:, 4:], pattern=pattern).out
    torch.testing.assert_close(layer(x, pattern=pattern, key_padding=real).out[1:, 4:], alone, **EXACT)
    outs, state = [], None
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        out, state, _ = layer(x[:, start:stop], pattern=pattern, key_padding=real[:, start:stop], state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1)[1:, 4:], alone, **EXACT)


def test_a_prompt_padded_on_the_right_is_continued_without_a_gap() -> None:
    layer = MultiHeadAttention(16, 4, rotary=True).double()
    x, real = tokens(), torch.ones(2, 7, dtype=torch.bool)
    real[1, 5:] = False
    _, state, _ = layer(x[:, :7], pattern=causal(), key_padding=real)
    out = layer(x[:, 7:8], pattern=causal(), state=state).out
    want = layer(torch.cat([x[1:, :5], x[1:, 7:8]], 1), pattern=causal()).out[:, -1:]
    torch.testing.assert_close(out[1:], want, **EXACT)


def test_the_state_holds_keys_and_values_of_key_value_heads() -> None:
    _, state, _ = MultiHeadAttention(16, 4, kv_heads=2)(torch.randn(2, 5, 16))
    assert isinstance(state, KVState) and state.k.shape == state.v.shape == (2, 2, 5, 4) and state.real is None
    assert MultiHeadAttention(16, 4)(torch.randn(2, 5, 16), torch.randn(2, 3, 16)).state is None


def test_a_head_width_of_its_own() -> None:
    layer = MultiHeadAttention(10, 3, head_dim=7)
    assert layer(torch.randn(1, 4, 10)).out.shape == (1, 4, 10) and layer.q_proj.out_features == 21


def test_what_does_not_go_together_is_refused() -> None:
    x = tokens()
    layer = MultiHeadAttention(16, 4, rotary=True).double()
    with pytest.raises(UnsupportedError, match="rotary"):
        layer(x, x)
    plain = MultiHeadAttention(16, 4).double()
    with pytest.raises(UnsupportedError, match="context"):
        plain(x, x, state=plain(x).state)
    with pytest.raises(ArgumentError, match=r"^context: got"):
        plain(x, x[..., :3])
    for context in (x.tolist(), x.float(), x.long()):
        with pytest.raises(ArgumentError, match=r"^context: got"):
            plain(x, context)
    with pytest.raises(ArgumentError, match=r"^heads: got 3"):
        MultiHeadAttention(16, 3)
    with pytest.raises(ArgumentError, match=r"^rotary: got"):
        MultiHeadAttention(15, 5, rotary=True)


def test_any_dtype_among_the_parameters_passes_and_no_other() -> None:
    layer = MultiHeadAttention(16, 4)
    layer.o_proj.bfloat16()
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(ArgumentError, match=rf"^x: got {dtype}; allowed: the layer's: torch.float32, torch.bfloat"):
            layer(tokens().to(dtype))
    layer.check_tokens(tokens().bfloat16(), None, None)


def test_layers_by_name() -> None:
    assert settings_of("multi-head-attention") == {
        "kv_heads": None, "head_dim": None, "bias": False, "rotary": False, "rotary_base": 10000.0,
    }  # fmt: skip
    with pytest.raises(UnknownNameError, match="did you mean multi-head-attention"):
        create("multi-head-atention", dim=8, heads=2)
    with pytest.raises(UnknownNameError, match="did you mean kv_heads"):
        create("multi-head-attention", dim=8, heads=2, kvheads=1)
