"""Normalised linear attention against row-normalised masked products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.recurrence import DiagonalInputs
from regard.recurrence.feature_maps import elu_plus_one, taylor_2_compressed
from regard.recurrence.normalized import NormalisedLinearAttention

N = 37


def make(phi=elu_plus_one, n: int = N) -> DiagonalInputs:
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for _ in range(3))
    return DiagonalInputs(phi(q), phi(k), v)


def weights(inputs: DiagonalInputs, eps: float) -> Tensor:
    """Every row of tril(φ(Q) φ(K)ᵀ) over its sum."""
    products = (inputs.q @ inputs.k.mT).tril()
    return products / (products.sum(-1, keepdim=True) + eps)


@pytest.mark.parametrize("phi", [elu_plus_one, taylor_2_compressed])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_scan_and_steps_are_the_row_normalised_product(phi, eps: float) -> None:
    inputs = make(phi)
    want = weights(inputs, eps) @ inputs.v
    for chunk_size in (1, 8, 64):
        mixer = NormalisedLinearAttention(eps, chunk_size)
        torch.testing.assert_close(mixer.scan(inputs)[0], want, rtol=0, atol=1e-12)
    state, outs = mixer.init(inputs), []
    for t in range(N):
        state, out = mixer.step(state, inputs.tokens(t, t + 1))
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 2), want, rtol=0, atol=1e-12)


def test_rows_sum_to_one() -> None:
    inputs = make()._replace(v=torch.ones(2, 3, N, 1, dtype=torch.float64))
    out, _ = NormalisedLinearAttention(eps=0.0).scan(inputs)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-14)


def test_a_decay_forgets_in_numerator_and_denominator_alike() -> None:
    inputs = make()
    g = torch.tensor([-0.5, 0.0, -torch.inf], dtype=torch.float64)
    out, _ = NormalisedLinearAttention(eps=0.0, chunk_size=8).scan(inputs._replace(log_decay=g))
    t = torch.arange(N)
    apart = (t[:, None] - t).clamp(min=0)
    kept = torch.where(apart == 0, 1.0, (g[:, None, None] * apart.clamp(min=1)).exp())
    products = (inputs.q @ inputs.k.mT * kept).tril()
    torch.testing.assert_close(out, products / products.sum(-1, keepdim=True) @ inputs.v, rtol=0, atol=1e-12)


def test_without_causality_every_token_reads_all_and_what_the_state_holds() -> None:
    inputs, mixer = make(), NormalisedLinearAttention(eps=0.0)
    products = inputs.q @ inputs.k.mT
    want = products / products.sum(-1, keepdim=True) @ inputs.v
    out, state = mixer.mix(inputs)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state.s, mixer.scan(inputs)[1].s, rtol=0, atol=1e-12)
    _, before = mixer.mix(inputs.tokens(0, 20))
    later, _ = mixer.mix(inputs.tokens(20, N), before)
    torch.testing.assert_close(later, want[:, :, 20:], rtol=0, atol=1e-12)
    with pytest.raises(ArgumentError, match=r"^log_decay: got a tensor"):
        mixer.mix(inputs._replace(log_decay=torch.zeros(3)))


def test_without_keys_nothing_comes_out_and_no_nan_goes_back() -> None:
    inputs = make()
    k = inputs.k.clone()
    k[:, :, :5] = 0
    leaves = [x.clone().requires_grad_() for x in (inputs.q, k, inputs.v)]
    for mixer in (NormalisedLinearAttention(eps=0.0), NormalisedLinearAttention()):
        out, _ = mixer.scan(DiagonalInputs(*leaves))
        out.sum().backward()
        assert (out[:, :, :5] == 0).all() and all(x.grad.isfinite().all() for x in leaves)


def test_numerator_and_denominator_are_summed_in_float32() -> None:
    inputs = DiagonalInputs(*(x.bfloat16() for x in make(n=600)[:3]))
    exact, _ = NormalisedLinearAttention().scan(DiagonalInputs(*(x.double() for x in inputs[:3])))
    out, state = NormalisedLinearAttention().scan(inputs)
    assert out.dtype == torch.bfloat16 and state.s.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding, of the output


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"^eps: got -1"):
        NormalisedLinearAttention(eps=-1.0)
    inputs = make()
    _, state = NormalisedLinearAttention().scan(inputs._replace(v=inputs.v[..., :2]))
    with pytest.raises(ArgumentError, match=r"^state: got"):
        NormalisedLinearAttention().scan(inputs, state)
    with pytest.raises(ArgumentError, match=r"^state: got"):
        NormalisedLinearAttention().mix(inputs, state)
