"""flash-linear-attention's plain PyTorch references (PyPI fla-core, with triton; they run on a CPU) beside ours.

They compute in float32 and scale q by Dk^(-1/2) inside; most have the heads after the tokens."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch
from tests.oracles.recurrent import DK, H, close, delta_form, diagonal_form, every_form, gradients, inputs, tokens_first
from torch import Tensor

from regard.recurrence import DiagonalInputs
from regard.recurrence.feature_maps import elu_plus_one, taylor, taylor_2_compressed
from regard.recurrence.normalized import NormalisedLinearAttention

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says that there is no GPU
    pytest.importorskip("fla.ops", reason="fla-core, or the triton it needs, is not installed", exc_type=ImportError)

SCALE = DK**-0.5
lengths = pytest.mark.parametrize("n", [1, 37, 130])


def naive(name: str):
    """`fla.ops.NAME.naive`."""
    return import_module(f"fla.ops.{name}.naive")


@lengths
@every_form
def test_linear_attention(form: str, n: int) -> None:
    x = inputs(n)
    want, state = naive("linear_attn").naive_recurrent_linear_attn(
        *tokens_first(x["q"], x["k"], x["v"]), initial_state=x["state"].float(), output_final_state=True
    )
    got = diagonal_form(form)(SCALE * x["q"], x["k"], x["v"], None, x["state"])
    close(got, (*tokens_first(want), state))


def test_linear_attention_in_chunks() -> None:
    x = inputs(192)
    q, k, v = (x[name].float() for name in "qkv")
    want = naive("linear_attn").naive_chunk_linear_attn(*tokens_first(q, k, v))
    close(diagonal_form("chunked")(SCALE * x["q"], x["k"], x["v"])[:1], tokens_first(want))


def test_normalised_linear_attention_and_its_states() -> None:
    x = inputs(37)
    q, k, v = elu_plus_one(x["q"]), elu_plus_one(x["k"]), x["v"]
    z = x["state"][..., 0].abs()
    want, (s, z_last) = naive("linear_attn").naive_recurrent_linear_attn(
        *tokens_first(q, k, v),
        scale=1.0,
        initial_state=(x["state"].float(), z[:, None].float()),
        output_final_state=True,
        normalize=True,
    )
    mixer = NormalisedLinearAttention(eps=1e-10, chunk_size=16)
    start = type(mixer.init(DiagonalInputs(q, k, v)))(torch.cat([x["state"], z[..., None]], -1))
    out, final = mixer.scan(DiagonalInputs(q, k, v), start)
    close((out, final.s), (*tokens_first(want), torch.cat([s, z_last[:, 0, :, :, None]], -1)))


@pytest.mark.parametrize("phi", [taylor, taylor_2_compressed])
def test_based(phi) -> None:
    x = inputs(37)
    q, k = x["q"], x["k"]
    want = naive("based").naive_parallel_based(q, k, x["v"], use_norm=True)
    out, _ = NormalisedLinearAttention(eps=1e-6).scan(DiagonalInputs(phi(q), phi(k), x["v"]))
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)  # theirs keeps float64


@lengths
@every_form
def test_retention(form: str, n: int) -> None:
    x = inputs(n)
    want = naive("retention").naive_retention(x["q"], x["k"], x["v"])
    decay = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(H)], dtype=torch.float64).log()
    close(diagonal_form(form)(SCALE * x["q"], x["k"], x["v"], decay)[:1], (want,))


@lengths
@every_form
def test_simple_gla(form: str, n: int) -> None:
    x = inputs(n)
    want, state = naive("simple_gla").naive_recurrent_simple_gla(
        *tokens_first(x["q"], x["k"], x["v"], x["g"]), initial_state=x["state"].float()
    )
    got = diagonal_form(form)(SCALE * x["q"], x["k"], x["v"], x["g"][..., None], x["state"])
    close(got, (*tokens_first(want), state))


@every_form
def test_simple_gla_in_chunks_and_in_parallel(form: str) -> None:
    """Their chunked and parallel forms take differences of running sums: no −inf, and no −30 without loss."""
    x = inputs(130, forget=False)
    heads_second = tokens_first(x["q"], x["k"], x["v"], x["g"])
    got = diagonal_form(form)(SCALE * x["q"], x["k"], x["v"], x["g"][..., None], x["state"])
    chunk = naive("simple_gla").naive_chunk_simple_gla(
        *heads_second, initial_state=x["state"].float(), output_final_state=True
    )
    close(got, (*tokens_first(chunk[0]), chunk[1]))
    parallel, _ = naive("simple_gla").naive_parallel_simple_gla(*heads_second)
    close(diagonal_form(form)(SCALE * x["q"], x["k"], x["v"], x["g"][..., None])[:1], tokens_first(parallel))


@lengths
@every_form
def test_gla(form: str, n: int) -> None:
    x = inputs(n)
    want, state = naive("gla").naive_recurrent_gla(
        *tokens_first(x["q"], x["k"], x["v"], x["gk"]), initial_state=x["state"], output_final_state=True
    )
    got = diagonal_form(form)(SCALE * x["q"], x["k"], x["v"], x["gk"], x["state"])
    close(got, (*tokens_first(want), state))


@lengths
@every_form
def test_hgrn(form: str, n: int) -> None:
    """h_t = f_t ⊙ h_{t-1} + u_t: every channel a head of width 1, with q = k = 1."""
    x = inputs(n)
    u, g, start = x["v"][:, 0, :, :DK], x["gk"][:, 0], x["state"][:, 0, :, 0]
    want, state = naive("hgrn").naive_recurrent_hgrn(u, g, initial_state=start.float(), output_final_state=True)

    def heads(y: Tensor) -> Tensor:
        return y.mT[..., None]

    one = torch.ones_like(heads(u))
    out, last = diagonal_form(form)(one, one, heads(u), heads(g), start[..., None, None])
    close((out[..., 0].mT, last[..., 0, 0]), (want, state))


@lengths
@every_form
def test_delta_rule(form: str, n: int) -> None:
    x = inputs(n)
    want = naive("delta_rule").delta_rule_recurrence(
        *(x[name] for name in ("q", "k", "v", "beta")), initial_state=x["state"].float()
    )
    close(delta_form(form)(SCALE * x["q"], x["k"], x["v"], x["beta"], None, x["state"]), want)


@every_form
def test_delta_rule_in_chunks_and_in_parallel(form: str) -> None:
    x = inputs(256)
    got = delta_form(form)(SCALE * x["q"], x["k"], x["v"], x["beta"])
    theirs = [x[name].float() for name in ("q", "k", "v", "beta")]
    close(got, naive("delta_rule").delta_rule_chunkwise(*theirs))
    close(got[:1], naive("delta_rule").delta_rule_parallel(*theirs)[:1])


@lengths
@every_form
def test_gated_delta_rule(form: str, n: int) -> None:
    x = inputs(n)
    out, state = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
        *tokens_first(x["q"], x["k"], x["v"], x["beta"], x["g"]), initial_state=x["state"], output_final_state=True
    )
    got = delta_form(form)(SCALE * x["q"], x["k"], x["v"], x["beta"], x["g"], x["state"])
    close(got, (*tokens_first(out), state))


@every_form
def test_gated_delta_rule_in_chunks(form: str) -> None:
    x = inputs(130, forget=False)
    out, state = naive("gated_delta_rule").naive_chunk_gated_delta_rule(
        *tokens_first(x["q"], x["k"], x["v"], x["g"], x["beta"]), initial_state=x["state"], output_final_state=True
    )
    got = delta_form(form)(SCALE * x["q"], x["k"], x["v"], x["beta"], x["g"], x["state"])
    close(got, (*tokens_first(out), state))


@every_form
def test_gradients(form: str) -> None:
    """Through the outputs and the final state, for every input and the first state."""
    x = inputs(37)

    def gla(q, k, v, g, s):
        out, state = naive("gla").naive_recurrent_gla(
            *tokens_first(q, k, v, g), initial_state=s, output_final_state=True
        )
        return out.transpose(1, 2), state

    def gated_delta(q, k, v, beta, g, s):
        out, state = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
            *tokens_first(q, k, v, beta, g), initial_state=s, output_final_state=True
        )
        return out.transpose(1, 2), state

    def scaled(run):
        return lambda q, *rest: run(SCALE * q, *rest)

    tensors = [x[name] for name in ("q", "k", "v", "gk", "state")]
    close(gradients(scaled(diagonal_form(form)), tensors), gradients(gla, tensors))
    tensors = [x[name] for name in ("q", "k", "v", "beta", "g", "state")]
    close(gradients(scaled(delta_form(form)), tensors), gradients(gated_delta, tensors))
