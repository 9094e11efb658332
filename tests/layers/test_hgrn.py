"""HGRN, and HGRN-2 as its extension to a matrix state."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch.nn.functional import silu

from regard.layers.hgrn import HGRNLayer
from regard.layers.hgrn_2 import HGRN2Layer


def test_a_vector_state_has_no_heads() -> None:
    x, outs = torch.randn(2, 9, 12, dtype=torch.float64), []
    for heads in (1, 3):
        torch.manual_seed(0)
        layer = HGRNLayer(12, heads, lower_bound=0.3).double()
        out, state, _ = layer(x)
        outs.append(out)
        assert state.inner.h.numel() == 2 * 12 and state.windows == ()
    torch.testing.assert_close(*outs, rtol=0, atol=1e-14)


def test_deep_layers_forget_slower() -> None:
    x, left = torch.randn(1, 2, 8, dtype=torch.float64), []
    for depth in range(4):
        torch.manual_seed(0)
        layer = HGRNLayer(8, 1, layer=depth, layers=4).double()
        left.append(layer.read(x, None, None).inputs.log_decay.exp())
    assert all((b > a).all() for a, b in pairwise(left))


def test_hgrn_2_with_one_channel_per_head_and_query_one_is_hgrn() -> None:
    one, two = HGRNLayer(6, 1, layer=1, layers=3).double(), HGRN2Layer(6, 6, layer=1, layers=3, chunk_size=4).double()
    for name in ("f_proj", "i_proj"):
        getattr(two, name).load_state_dict(getattr(one, name).state_dict())
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    h, _ = one.mixer.scan(one.read(x, None, None).inputs)
    inputs = two.read(x, None, None).inputs
    out, _ = two.mixer.scan(inputs._replace(q=torch.ones_like(inputs.q), v=silu(inputs.v)))
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), h[:, 0], rtol=0, atol=1e-12)


def test_hgrn_2_ties_its_keys_and_holds_key_dim_numbers_per_channel() -> None:
    layer = HGRN2Layer(8, 2, key_dim=5, lower_bound=0.2).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    inputs = layer.read(x, None, None).inputs
    torch.testing.assert_close(inputs.k, 1 - inputs.log_decay.exp())
    assert layer(x).state.inner.s.shape == (3, 2, 5, 4)
    with torch.device("meta"):
        paper = HGRN2Layer(1024, 8)
    assert paper.key_dim == 128
