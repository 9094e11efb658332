"""Attention at selected tokens: the budget, the loss that keeps it, streaming by a threshold."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError, UnsupportedError
from regard.layers.selective_attention_hybrid import SelectiveAttentionHybrid

N = 17


def make(**settings) -> tuple[SelectiveAttentionHybrid, torch.Tensor]:
    return SelectiveAttentionHybrid(16, 4, **settings).double(), torch.randn(2, N, 16, dtype=torch.float64)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("rows", [1, 6, None])
def test_only_the_rows_with_the_largest_gates_are_changed_and_as_in_training(rows: int | None, rotary: bool) -> None:
    layer, x = make(rows=rows, rotary=rotary)
    trained = layer(x)
    out, _, aux = layer.eval()(x)
    expected = torch.zeros(2, N, dtype=torch.bool)
    expected.scatter_(1, trained.aux.gates.topk(5 if rows is None else rows).indices, True)
    assert torch.equal(aux.rows, expected) and aux.loss == 0
    torch.testing.assert_close(out[expected], trained.out[expected], rtol=0, atol=1e-12)
    assert torch.equal(out[~expected], x[~expected])


@pytest.mark.parametrize("settings", [{"rows": N}, {"rows": 100}, {"threshold": 0.0}])
def test_a_budget_of_everything_is_training(settings) -> None:
    layer, x = make(**settings)
    want = layer(x).out
    torch.testing.assert_close(layer.eval()(x).out, want, rtol=0, atol=1e-12)


def test_each_row_has_the_budget_of_its_own_length() -> None:
    layer, x = make()
    real = torch.arange(N)[None] >= torch.tensor([[0], [8]])  # 17 and 9 tokens: ⌈√17⌉ = 5, √9 = 3
    out, _, aux = layer.eval()(x, key_padding=real)
    assert aux.rows.sum(1).tolist() == [5, 3] and not (aux.rows & ~real).any()
    torch.testing.assert_close(out[1:, 8:], layer(x[1:, 8:]).out, rtol=0, atol=1e-12)
    assert (out[1, :8] == 0).all()


def test_a_threshold_streams_and_the_top_rows_do_not() -> None:
    layer, x = make(threshold=0.5, rotary=True)
    layer.eval()
    want, _, aux = layer(x)
    assert 0 < aux.rows.sum() < 2 * N and torch.equal(aux.rows, aux.gates > 0.5)
    outs, state = [], None
    for t in range(N):
        out, state, _ = layer(x[:, t : t + 1], state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-12)
    top, _ = make()
    _, state, _ = top.eval()(x)
    with pytest.raises(UnsupportedError, match="selective-attention-hybrid takes no state in evaluation without a thr"):
        top(x, state=state)


def test_the_loss_counts_what_the_gates_open_beyond_the_budget() -> None:
    layer, x = make(rows=4)
    gates = (x @ layer.gate.weight[0]).sigmoid()
    _, _, aux = layer(x)
    want = 1e-3 * sum(max(0.0, g.mean().item() - 4 / N) for g in gates) / 2
    assert aux.loss.item() == pytest.approx(want, rel=1e-12) and want > 0
    aux.loss.backward()
    assert layer.gate.weight.grad.abs().max() > 0
    assert make(rows=N)[0](x).aux.loss == 0


def test_no_row_at_all() -> None:
    layer, x = make(threshold=0.999999)
    assert torch.equal(layer.eval()(x).out, x)


def test_bad_settings_are_named() -> None:
    for name, value in (("rows", 0), ("threshold", 1.0), ("loss_weight", -1.0)):
        with pytest.raises(ArgumentError, match=f"^{name}: got"):
            SelectiveAttentionHybrid(16, 4, **{name: value})
