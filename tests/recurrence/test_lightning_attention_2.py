"""What the card of Lightning Attention-2 asks to be shown, but for the H100 headline (that is evidence)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnknownNameError
from regard.recurrence import LightningAttention2, LightningInputs, tnl_log_decay

N, H, D, DV = 75, 2, 8, 6
BLOCKS, LAMBDAS = [16, 32, 64, N], [1.0, 0.99, 0.5]


def make(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, H, n, d, generator=generator, dtype=torch.float64) for d in (D, D, DV))
    return (q / D**0.5).to(dtype), k.to(dtype), v.to(dtype)


def masked_product(q: Tensor, k: Tensor, v: Tensor, lam: float) -> Tensor:
    """O = [(Q Kᵀ) ⊙ M] V, M_ts = λ^{t−s} for t ≥ s: the parallel form written out, apart from the library."""
    t = torch.arange(q.shape[2], dtype=torch.float64)
    m = torch.where(t[:, None] >= t, lam ** (t[:, None] - t).clamp(min=0), 0.0).to(q.dtype)
    return (q @ k.mT * m) @ v


def lightning(lam: float, chunk_size: int = 64) -> LightningAttention2:
    return LightningAttention2((math.log(lam) if lam else -math.inf,) * H, chunk_size)


def by_steps(mixer: LightningAttention2, inputs: LightningInputs) -> Tensor:
    state, outs = mixer.init(inputs), []
    for t in range(inputs.length):
        state, out = mixer.step(state, inputs.tokens(t, t + 1))
        outs.append(out)
    return torch.cat(outs, 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("lam", LAMBDAS)
def test_chunked_is_parallel_is_recurrent(lam: float, dtype: torch.dtype, tolerance: float) -> None:
    inputs = LightningInputs(*make(dtype))
    want = masked_product(*(x.double() for x in inputs[:3]), lam)
    scale = max(1.0, want.abs().max().item())
    for out in [*(lightning(lam, b).scan(inputs)[0] for b in BLOCKS), by_steps(lightning(lam), inputs)]:
        assert out.dtype == dtype
        assert (out.double() - want).abs().max() <= tolerance * scale


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("lam", LAMBDAS)
def test_gradients_are_those_of_the_parallel_form(lam: float, block: int) -> None:
    def gradients(run) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in make()]
        run(*leaves).square().sum().backward()
        return [x.grad for x in leaves]

    want = gradients(lambda q, k, v: masked_product(q, k, v, lam))
    got = gradients(lambda q, k, v: lightning(lam, block).scan(LightningInputs(q, k, v))[0])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)


def test_gradcheck() -> None:
    leaves = [x[:1].requires_grad_() for x in make(n=7)]
    assert torch.autograd.gradcheck(lambda *a: lightning(0.9, 3).scan(LightningInputs(*a))[0], leaves, fast_mode=True)


def test_the_state_is_handed_over_and_one_more_token_is_the_last_row() -> None:
    inputs, mixer = LightningInputs(*make()), lightning(0.9, 16)
    out, final = mixer.scan(inputs)
    first, state = mixer.scan(inputs.tokens(0, 29))
    second, last = mixer.scan(inputs.tokens(29, N), state)
    torch.testing.assert_close(torch.cat([first, second], 2), out, rtol=0, atol=1e-10)
    torch.testing.assert_close(last.s, final.s, rtol=0, atol=1e-10)
    _, before = mixer.scan(inputs.tokens(0, N - 1))
    _, row = mixer.step(before, inputs.tokens(N - 1, N))
    torch.testing.assert_close(row, out[:, :, -1:], rtol=0, atol=1e-10)


def test_the_limits_plain_linear_attention_and_each_token_alone() -> None:
    q, k, v = make()
    plain = torch.stack([q[:, :, t, None] @ (k[:, :, : t + 1].mT @ v[:, :, : t + 1]) for t in range(N)], 2)[..., 0, :]
    torch.testing.assert_close(lightning(1.0).scan(LightningInputs(q, k, v))[0], plain, rtol=0, atol=1e-10)
    alone = (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(lightning(0.0).scan(LightningInputs(q, k, v))[0], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("left", [True, False])
def test_padding_neither_writes_nor_decays(left: bool) -> None:
    q, k, v = make()
    real = torch.ones(2, N, dtype=torch.bool)
    pad = slice(0, 20) if left else slice(N - 20, N)
    real[1, pad] = False
    out, state = lightning(0.9, 16).scan(LightningInputs(q, k, v, real))
    alone, alone_state = lightning(0.9, 16).scan(LightningInputs(*(x[1:, :, real[1]] for x in (q, k, v))))
    torch.testing.assert_close(out[1:, :, real[1]], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(state.s[1:], alone_state.s, rtol=0, atol=1e-10)


def test_slopes_as_the_released_code_has_them() -> None:
    eight = -tnl_log_decay(8, layer=0, layers=4) / (1 + 1e-5)
    assert eight.tolist() == pytest.approx([2.0**-h for h in range(1, 9)])
    assert tnl_log_decay(8, layer=3, layers=4).exp().min() >= 1 - 1e-5
    six = (-tnl_log_decay(6, layer=0, layers=4) / (1 + 1e-5)).tolist()  # four of H=4, then every second of H=8
    assert six == pytest.approx([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    rates = [tnl_log_decay(4, layer=layer, layers=5)[0].item() for layer in range(5)]
    assert rates == sorted(rates), "deeper layers forget less"


def test_slopes_as_the_paper_has_them() -> None:
    got = tnl_log_decay(4, layer=1, layers=4, slopes="paper").exp().tolist()
    assert got == pytest.approx([math.exp(-2 * h * 0.75) for h in (1, 2, 3, 4)])


def test_bad_input_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"log_decay: got \(0.5,\)"):
        LightningAttention2((0.5,))
    with pytest.raises(ArgumentError, match="layer: got 4"):
        tnl_log_decay(4, layer=4, layers=4)
    with pytest.raises(UnknownNameError, match="did you mean paper"):
        tnl_log_decay(4, slopes="papr")  # type: ignore[arg-type]
    q, k, v = make()
    with pytest.raises(ArgumentError, match="q: got"):
        LightningAttention2((-1.0,)).scan(LightningInputs(q, k, v))
    with pytest.raises(ArgumentError, match="key_padding: got"):
        lightning(0.9).scan(LightningInputs(q, k, v, torch.ones(2, 3, dtype=torch.bool)))
