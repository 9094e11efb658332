"""Recurrences as linear time-varying systems, and the equalities that the dynamical-systems paper states."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnsupportedError
from regard.recurrence import DiagonalDecay, DiagonalInputs
from regard.recurrence.delta_rule import DeltaInputs, DeltaRule
from regard.recurrence.dsf import LinearSystem, linear_system, mixing_matrix
from regard.recurrence.feature_maps import elu_plus_one, taylor
from regard.recurrence.hgrn import HGRN, HGRNInputs
from regard.recurrence.normalized import NormalisedLinearAttention
from regard.recurrence.prefix_softmax import PrefixInputs, PrefixSoftmax
from regard.registry import lookup

N = 9
EXACT = {"rtol": 0.0, "atol": 1e-12}


def draw(*shape: int) -> Tensor:
    return torch.randn(2, 3, N, *shape, dtype=torch.float64)


def some() -> dict[str, tuple]:
    q, k, v = draw(4), draw(4), draw(5)
    gate = -draw(4).abs()
    gate[:, :, 3] = -torch.inf
    beta = torch.rand(2, 3, N, dtype=torch.float64)
    scores = 3 * draw()
    scores[0, :, :2] = -torch.inf
    fixed = torch.tensor([0.0, -0.5, -torch.inf], dtype=torch.float64)
    return {
        "no decay": (DiagonalDecay(4), DiagonalInputs(q, k, v)),
        "fixed decay": (DiagonalDecay(4), DiagonalInputs(q, k, v, fixed)),
        "gate per channel": (DiagonalDecay(4), DiagonalInputs(q, k, v, gate)),
        "delta": (DeltaRule(4), DeltaInputs(q, k, v, beta)),
        "gated delta": (DeltaRule(4), DeltaInputs(q, k, v, beta, gate[..., 0])),
        "normalised": (NormalisedLinearAttention(chunk_size=4), DiagonalInputs(q.exp(), k.exp(), v)),
        "normalised, no key at first": (
            NormalisedLinearAttention(eps=0.0),
            DiagonalInputs(q.exp(), k.exp() * (torch.arange(N) > 2)[:, None], v),
        ),
        "prefix softmax": (PrefixSoftmax(4), PrefixInputs(scores, v)),
    }


def test_channels_that_decay_apart_are_heads_apart() -> None:
    u, g = draw(5), -draw(5).abs()
    system = linear_system(HGRN(), HGRNInputs(u, g))
    torch.testing.assert_close(mixing_matrix(HGRN(), HGRNInputs(u, g), "u").flatten(1, 2), system.matrix(), **EXACT)
    apart = system.run(u.mT.flatten(1, 2)[..., None])[..., 0].unflatten(1, (3, 5)).mT
    torch.testing.assert_close(apart, HGRN().scan(HGRNInputs(u, g))[0], **EXACT)


def unrolled(system: LinearSystem) -> Tensor:
    """Φ entry by entry, as it is defined."""
    phi = torch.zeros(2, 3, N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(i + 1):
            product = torch.eye(system.b.shape[-1], dtype=torch.float64)
            for k in range(j + 1, i + 1):
                product = system.lam[:, :, k] @ product
            phi[:, :, i, j] = (system.c[:, :, i, None] @ product @ system.b[:, :, j, :, None])[..., 0, 0]
        phi[:, :, i, i] += system.d[:, :, i]
    return phi


@pytest.mark.parametrize("name", some())
def test_system_matrix_and_scan_are_one_function(name: str) -> None:
    recurrence, inputs = some()[name]
    system, want = linear_system(recurrence, inputs), recurrence.scan(inputs)[0]
    phi = system.matrix()
    torch.testing.assert_close(phi, unrolled(system), **EXACT)
    torch.testing.assert_close(phi @ inputs.v, want, **EXACT)
    torch.testing.assert_close(system.run(inputs.v), want, **EXACT)
    numeric = mixing_matrix(recurrence, inputs)
    torch.testing.assert_close(numeric, phi[:, :, None].expand_as(numeric), **EXACT)


def test_the_direct_path_d_is_in_all_forms() -> None:
    system = LinearSystem(draw(2, 2), draw(2), draw(2), draw())
    u = draw(3)
    torch.testing.assert_close(system.matrix(), unrolled(system), **EXACT)
    torch.testing.assert_close(system.matrix() @ u, system.run(u), **EXACT)


def test_the_normaliser_may_sit_in_the_state_or_in_the_readout() -> None:
    """Λ_i = η_{i-1}/η_i against a plain sum divided when read, for the sum over keys and for a learned η."""
    phi_q, phi_k, u = elu_plus_one(draw(4)), elu_plus_one(draw(4)), draw(5)
    plain = linear_system(DiagonalDecay(), DiagonalInputs(phi_q, phi_k, u))
    products = (phi_q @ phi_k.mT).tril()
    for eta in (products.sum(-1), draw().exp()):
        want = (products / eta[..., None]) @ u
        stable = plain._replace(c=plain.c / eta[..., None])
        in_state = stable.with_normaliser_in_state(eta)
        torch.testing.assert_close(stable.run(u), want, **EXACT)
        torch.testing.assert_close(in_state.run(u), want, **EXACT)
        torch.testing.assert_close(in_state.c, phi_q, **EXACT)
        torch.testing.assert_close(in_state.lam[:, :, 4, 0, 0], eta[:, :, 3] / eta[:, :, 4], **EXACT)


def test_a_normaliser_in_the_state_explodes_where_it_drops() -> None:
    q, k, u = torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1)
    eta = torch.tensor([[[1e30, 1e-30, 1.0, 1.0]]])
    stable = linear_system(DiagonalDecay(), DiagonalInputs(q / eta[..., None], k, u))
    assert stable.run(u).isfinite().all()
    assert not stable.with_normaliser_in_state(eta).run(u).isfinite().all()


def test_the_transition_of_mamba_with_a_equal_to_one_is_a_reversed_sigmoid() -> None:
    x = torch.linspace(-30, 30, 121, dtype=torch.float64)
    torch.testing.assert_close((-torch.nn.functional.softplus(x)).exp(), 1 - x.sigmoid(), rtol=0, atol=1e-15)
    x, q, k, v = draw(), draw(4), draw(4), draw(5)
    g = -torch.nn.functional.softplus(x)[..., None]
    out, _ = DiagonalDecay().scan(DiagonalInputs(q, k, v, g))
    h, outs = torch.zeros(2, 3, 4, 5, dtype=torch.float64), []
    for t in range(N):  # a gated linear RNN with forget gate 1 − σ(x)
        h = (1 - x[:, :, t].sigmoid())[..., None, None] * h + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append((q[:, :, t, :, None] * h).sum(-2))
    torch.testing.assert_close(out, torch.stack(outs, 2), **EXACT)


def test_truncated_exponentials_near_softmax_attention_as_the_order_grows() -> None:
    q, k, v = draw(3).clamp(-1, 1), draw(3).clamp(-1, 1), draw(5)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixer, errors = NormalisedLinearAttention(eps=0.0), []
    for order in (1, 2, 3, 4, 5, 6):
        out, _ = mixer.scan(DiagonalInputs(taylor(q, order), taylor(k, order), v))
        errors.append((out - want).abs().max().item())
    assert all(later < 0.7 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-3


def test_what_has_no_export_says_so() -> None:
    with pytest.raises(UnsupportedError, match="object has no export"):
        linear_system(object(), None)
    recurrence, inputs = lookup("recurrence", "diagonal-decay").example()
    with pytest.raises(ArgumentError, match=r"^values: got 'w'; allowed: a field of the inputs: q, k, v"):
        mixing_matrix(recurrence, inputs, "w")
