"""What the oracles of the recurrences share: inputs, the three forms, a comparison with results in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from regard.recurrence import delta, diagonal

B, H, DK, DV = 2, 3, 16, 24
FORMS = ["recurrent", "parallel", "chunked"]
every_form = pytest.mark.parametrize("form", FORMS)


def of(module, form: str) -> Callable:
    """A form of an executor; chunks of 16, so that they neither divide the tests' lengths nor hold them all."""
    return partial(module.chunked, chunk_size=16) if form == "chunked" else getattr(module, form)


diagonal_form, delta_form = partial(of, diagonal), partial(of, delta)


def inputs(n: int, *, seed: int = 0, forget: bool = True) -> dict[str, Tensor]:
    """q, k of length 1, v, beta in [0, 2], gates per channel (`gk`) and per token (`g`), state; float64.

    forget: among the gates are 0, −30 and −inf, among beta 0, 1 and 2."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def some(x: Tensor, *values: float) -> Tensor:
        for value in values if forget else ():
            x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.05, value)
        return x

    k = randn(B, H, n, DK)
    return {
        "q": randn(B, H, n, DK),
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": randn(B, H, n, DV),
        "beta": some(2 * torch.rand(B, H, n, dtype=torch.float64, generator=generator), 0.0, 1.0, 2.0),
        "g": some(-0.3 * randn(B, H, n).exp(), 0.0, -30.0, -torch.inf),
        "gk": some(-0.3 * randn(B, H, n, DK).exp(), 0.0, -30.0, -torch.inf),
        "state": randn(B, H, DK, DV),
    }


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    """(B, H, N, …) ↔ (B, N, H, …)."""
    return [x.transpose(1, 2) for x in tensors]


def gradients(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of sin(out) + cos(state), with respect to the tensors."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    out, state = function(*leaves)
    return list(torch.autograd.grad(out.sin().sum() + state.cos().sum(), leaves))


def close(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    """`want` was computed in float32, by other sums."""
    for a, b in zip(got, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)
