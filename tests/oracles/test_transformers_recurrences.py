"""transformers' own plain PyTorch references: the gated delta rule of Qwen3-Next, and Mamba-2 (SSD).

Each is wrapped there so that an installed package (fla, mamba-ssm) is called instead: it is unwrapped here.
They compute in float32; the tokens come before the heads."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
from tests.oracles.recurrent import (
    DK,
    B,
    H,
    close,
    delta_form,
    diagonal_form,
    every_form,
    gradients,
    inputs,
    tokens_first,
)

lengths = pytest.mark.parametrize("n", [1, 37, 130])
why = "transformers without this model"
qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason=why, exc_type=ImportError)
mamba = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason=why, exc_type=ImportError)
SCALE = DK**-0.5


def gated_delta(name: str):
    """One of the two references, in our order and layout."""

    def run(q, k, v, beta, g, state):
        q, k, v, g, beta = tokens_first(q, k, v, g, beta)
        out, last = unwrap(getattr(qwen, name))(q, k, v, g, beta, initial_state=state, output_final_state=True)
        return out.transpose(1, 2), last

    return run


def delta_inputs(n: int, forget: bool) -> list[torch.Tensor]:
    x = inputs(n, forget=forget)
    return [x[name] for name in ("q", "k", "v", "beta", "g", "state")]


@lengths
@every_form
def test_recurrent_gated_delta_rule(form: str, n: int) -> None:
    q, *rest = delta_inputs(n, forget=True)
    close(delta_form(form)(SCALE * q, *rest), gated_delta("torch_recurrent_gated_delta_rule")(q, *rest))


@lengths
@every_form
def test_chunked_gated_delta_rule(form: str, n: int) -> None:
    """Its decays are differences of running sums: −inf would be NaN there."""
    q, *rest = delta_inputs(n, forget=False)
    close(delta_form(form)(SCALE * q, *rest), gated_delta("torch_chunk_gated_delta_rule")(q, *rest))


@every_form
@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_gradients_of_the_gated_delta_rule(name: str, form: str) -> None:
    tensors = delta_inputs(70, forget=False)
    got = gradients(lambda q, *rest: delta_form(form)(SCALE * q, *rest), tensors)
    close(got, gradients(gated_delta(name), tensors))


def ssd(n: int):
    """Mamba-2's x (B, N, H, P), Δ > 0, A < 0, B and C in one group for all heads, D; and a state (B, H, P, N)."""
    g = torch.Generator().manual_seed(1)
    x, b, c = (torch.randn(B, n, *tail, generator=g) for tail in ((H, 8), (1, DK), (1, DK)))
    dt = torch.rand(B, n, H, generator=g)
    return (
        x,
        dt,
        -torch.rand(H, generator=g) * 8,
        b,
        c,
        torch.randn(H, generator=g),
        torch.randn(B, H, 8, DK, generator=g),
    )


def ours(form: str, x, dt, a, b, c, d, state):
    """S_t = e^{Δ_t A} S_{t-1} + Δ_t B_t x_tᵀ, y_t = S_tᵀ C_t + D x_t: the diagonal decay with q = C, k = B, v = Δ x."""
    q, k = (y.double().transpose(1, 2).expand(-1, H, -1, -1) for y in (c, b))
    values, gate = (dt[..., None] * x).double().transpose(1, 2), (dt * a).double().transpose(1, 2)[..., None]
    out, last = diagonal_form(form)(q, k, values, gate, state.double().mT)
    return out.transpose(1, 2) + d.double()[:, None] * x, last.mT


@lengths
@every_form
def test_mamba2_in_chunks(form: str, n: int) -> None:
    x, dt, a, b, c, d, state = ssd(n)
    want = unwrap(mamba.mamba2_chunk_scan)(
        x, dt, a, b, c, chunk_size=16, D=d, initial_states=state, return_final_states=True
    )
    close(ours(form, x, dt, a, b, c, d, state), want)


@every_form
def test_mamba2_step_by_step(form: str) -> None:
    x, dt, a, b, c, d, state = ssd(37)
    got = ours(form, x, dt, a, b, c, d, state)
    step, state, outs = unwrap(mamba.mamba2_selective_state_update), state.clone(), []
    for t in range(37):  # the state is changed in place; Δ, A and D come spread over the channels of a head
        spread = dt[:, t, :, None].expand(x[:, t].shape), a[:, None, None].expand(state.shape[1:])
        outs.append(step(state, x[:, t], *spread, b[:, t], c[:, t], D=d[:, None]))
    close(got, (torch.stack(outs, 1), state))
