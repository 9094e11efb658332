"""Aaren: constant memory, and what a query that does not depend on its token can and cannot do."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError
from regard.layers.aaren import Aaren


def test_the_same_tokens_in_another_order_give_the_same_last_output() -> None:
    layer, x = Aaren(16, 4).double(), torch.randn(1, 20, 16, dtype=torch.float64)
    shuffled = x[:, torch.randperm(20)]
    torch.testing.assert_close(layer(shuffled).out[:, -1], layer(x).out[:, -1], rtol=0, atol=1e-12)


def test_it_cannot_ask_for_something_else_at_another_token() -> None:
    """Outputs are averages under one set of weights: token i takes part in its own output by its key only."""
    layer, x = Aaren(8, 2).double(), torch.randn(1, 6, 8, dtype=torch.float64)
    layer.k_proj.weight.data[:] = 0  # every key alike
    mean = layer.o_proj(layer.v_proj(x).cumsum(1) / torch.arange(1, 7)[:, None])
    torch.testing.assert_close(layer(x).out, mean, rtol=0, atol=1e-12)


def test_the_query_costs_one_token_and_its_gradient_arrives() -> None:
    layer = Aaren(16, 4)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 16 * 16 + 16
    layer(torch.randn(2, 9, 16)).out.square().sum().backward()
    assert layer.token.grad.abs().max() > 0 and layer.q_proj.weight.grad.abs().max() > 0


def test_memory_is_constant_while_streaming() -> None:
    layer, state = Aaren(16, 4), None
    for _ in range(5):
        _, state, _ = layer(torch.randn(1, 40, 16), state=state)
        assert [tuple(t.shape) for t in state.inner] == [(1, 4), (1, 4), (1, 4, 4)] and state.windows == ()
    assert state.seen.tolist() == [200]


def test_a_state_of_another_width_is_refused() -> None:
    _, state, _ = Aaren(16, 2)(torch.randn(1, 3, 16))
    with pytest.raises(ArgumentError, match=r"^state: got"):
        Aaren(16, 4)(torch.randn(1, 3, 16), state=state)
    with pytest.raises(ArgumentError, match=r"^heads: got 3"):
        Aaren(16, 3)
