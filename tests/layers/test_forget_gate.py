"""Lower bounds over depth, and the gate they bound."""

from __future__ import annotations

import pytest
import torch

from regard.errors import ArgumentError
from regard.layers.forget_gate import ForgetGate, lower_bounds, share_lower_bounds


def test_bounds_start_at_zero_and_rise_with_depth_in_every_channel() -> None:
    bounds = lower_bounds(torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert (bounds[0] == 0).all() and (bounds.diff(dim=0) > 0).all() and (bounds < 1).all()
    uniform = lower_bounds(torch.zeros(4, 3, dtype=torch.float64))
    torch.testing.assert_close(uniform[:, 0], torch.tensor([0, 0.25, 0.5, 0.75], dtype=torch.float64))
    assert [ForgetGate(k, 4, None).lower_bound for k in range(4)] == uniform[:, 0].tolist()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_gate_is_its_definition_and_keeps_its_complement_where_f_is_one(layer: int) -> None:
    z = torch.tensor([-800.0, -3.0, 0.0, 2.0, 45.0], dtype=torch.float64, requires_grad=True)
    log_f, write = ForgetGate(layer, 4, None)(z)
    low = layer / 4
    want = low + (1 - low) * z.sigmoid()
    torch.testing.assert_close(log_f.exp(), want, rtol=0, atol=1e-15)
    torch.testing.assert_close(write, (1 - low) * (-z).sigmoid(), rtol=1e-14, atol=0)
    assert write[-1] > 1e-20 and (1 - want)[-1] == 0, "1 − f, taken as a difference, is gone"
    (log_f.sum() + write.sum()).backward()
    assert z.grad is not None and z.grad.isfinite().all() and log_f.isfinite().all()


def test_a_model_shares_one_learned_gamma() -> None:
    gates = [ForgetGate(k, 3, None).double() for k in range(3)]
    z = torch.randn(7, 4, dtype=torch.float64)
    fixed = [gate(z)[0] for gate in gates]
    gamma = share_lower_bounds(gates, 4)
    gamma.data = gamma.data.double()
    for gate, want in zip(gates, fixed, strict=True):
        torch.testing.assert_close(gate(z)[0], want, rtol=0, atol=1e-12)
    sum(gate(z)[0].sum() for gate in gates).backward()
    assert gamma.grad is not None and gamma.grad.isfinite().all() and gamma.grad.abs().min() > 0
    assert all(gate.gamma is gamma for gate in gates)


def test_the_gradient_of_gamma_is_that_of_the_definition() -> None:
    gates = [ForgetGate(k, 3, None) for k in range(3)]
    gamma = share_lower_bounds(gates, 2)
    z = torch.randn(3, 4, 2, dtype=torch.float64)

    def run(values: torch.Tensor) -> torch.Tensor:
        parts = [torch.func.functional_call(gate, {"gamma": values}, (z[k],))[0].exp() for k, gate in enumerate(gates)]
        return torch.stack(parts)

    start = torch.randn(gamma.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (start,))
    bounds = lower_bounds(start)[:, None]
    torch.testing.assert_close(run(start), bounds + (1 - bounds) * z.sigmoid())


def test_what_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"^layer: got 3; allowed: 0 … 2"):
        ForgetGate(3, 3, None)
    with pytest.raises(ArgumentError, match=r"^lower_bound: got 1.0"):
        ForgetGate(0, 3, 1.0)
    with pytest.raises(ArgumentError, match=r"^layers: got \[2, 3\]"):
        share_lower_bounds([ForgetGate(0, 2, None), ForgetGate(0, 3, None)], 4)
