"""Feature maps: the kernel each one is said to be, its sign, its size."""

from __future__ import annotations

import math

import pytest
import torch

from regard.errors import ArgumentError
from regard.recurrence import feature_maps as maps

POSITIVE = {
    "elu+1": maps.elu_plus_one,
    "taylor": maps.taylor,
    "taylor compressed": maps.taylor_2_compressed,
    "exp": maps.hedgehog_exp,
    "exp of queries": maps.hedgehog_exp_of_queries,
    "halves": maps.hedgehog_softmax_halves,
    "joint": maps.hedgehog_joint_softmax,
}


def pair(d: int = 16, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    return scale * torch.randn(50, d, dtype=torch.float64), scale * torch.randn(50, d, dtype=torch.float64)


def dot(phi, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return phi(q) @ phi(k).mT


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_taylor_features_are_the_polynomial_of_the_scaled_product(scale: float) -> None:
    q, k = pair(16, scale)
    s = q @ k.mT / 4
    want = 1 + s + s**2 / 2
    tolerance = 1e-12 * want.abs().max().item()
    assert maps.taylor(q).shape[-1] == 273 and maps.taylor_2_compressed(q).shape[-1] == 153
    for phi in (maps.taylor, maps.taylor_2_compressed):
        torch.testing.assert_close(dot(phi, q, k), want, rtol=0, atol=tolerance)
    assert dot(maps.taylor_2_compressed, q, k).min() >= 0.5 - tolerance


def test_taylor_of_any_order_nears_the_exponential_as_the_order_grows() -> None:
    q, k = (x.clamp(-1, 1) for x in pair(3))  # |s| ≤ √3
    s = q @ k.mT / math.sqrt(3)
    errors = []
    for order in range(6):
        got = dot(lambda x, order=order: maps.taylor(x, order), q, k)
        want = sum(s**r / math.factorial(r) for r in range(order + 1))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        errors.append((got - s.exp()).abs().max().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[1]
    with pytest.raises(ArgumentError, match=r"^order: got -1"):
        maps.taylor(q, -1)


@pytest.mark.parametrize(("most", "allowed"), [(0.5, 0.03), (1.0, 0.22), (2.0, 2.5)])
def test_the_error_of_order_two_grows_with_the_score(most: float, allowed: float) -> None:
    s = torch.linspace(-most, most, 101, dtype=torch.float64)
    worst = (s.exp() - (1 + s + s**2 / 2)).abs().max().item()
    remainder = math.exp(most) - 1 - most - most**2 / 2
    assert worst == pytest.approx(remainder) and worst < allowed


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_weights_are_positive(name: str, scale: float) -> None:
    q, k = pair(8, scale)
    weights = dot(POSITIVE[name], q, k)
    assert weights.isfinite().all() and (weights > 0).all()


def test_elu_plus_one_is_torchs_elu_and_does_not_vanish() -> None:
    x = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(maps.elu_plus_one(x), torch.nn.functional.elu(x) + 1, rtol=0, atol=1e-13)
    assert maps.elu_plus_one(torch.tensor([-50.0])).item() > 0
    assert torch.autograd.gradcheck(maps.elu_plus_one, x)


def test_relu_is_torchs() -> None:
    x = torch.randn(20)
    assert torch.equal(maps.relu(x), torch.relu(x))


def test_spiky_features_are_a_sum_of_hyperbolic_cosines() -> None:
    q, k = pair(6)
    want = 2 * (q[:, None] + k).cosh().sum(-1)
    torch.testing.assert_close(dot(maps.hedgehog_exp, q, k), want, rtol=1e-13, atol=0)
    torch.testing.assert_close(dot(maps.hedgehog_exp, -q, -k), want, rtol=1e-13, atol=0)
    aligned = [dot(maps.hedgehog_exp, c * q[:1], c * q[:1]).item() for c in (0.5, 1.0, 2.0)]
    assert aligned == sorted(aligned)


def test_the_shift_of_queries_cancels_in_the_ratio_and_keeps_them_finite() -> None:
    q, k = pair(6)
    rows = [(phi(q) @ maps.hedgehog_exp(k).mT) for phi in (maps.hedgehog_exp, maps.hedgehog_exp_of_queries)]
    normal = [row / row.sum(-1, keepdim=True) for row in rows]
    torch.testing.assert_close(normal[0], normal[1], rtol=1e-13, atol=0)
    far = torch.tensor([[300.0, -5.0]])
    assert maps.hedgehog_exp(far).isinf().any() and maps.hedgehog_exp_of_queries(far).isfinite().all()


def test_softmax_features_are_bounded() -> None:
    q, k = pair(6, 30.0)
    assert dot(maps.hedgehog_softmax_halves, q, k).max() <= 2 and dot(maps.hedgehog_joint_softmax, q, k).max() <= 1
    torch.testing.assert_close(maps.hedgehog_softmax_halves(q).sum(-1), torch.full((50,), 2.0).double())
    spiky = maps.hedgehog_exp(2 * k / 30)
    torch.testing.assert_close(maps.hedgehog_joint_softmax(k / 30), spiky / spiky.sum(-1, keepdim=True))
