"""The diagonal-decay recurrence: three forms, one function, checked against a plain loop over scalars."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.recurrence.decay import between, from_start, to_end
from regard.recurrence.diagonal import chunked, parallel, recurrent

B, H, DK, DV = 2, 3, 6, 5
DECAYS = ["none", "head", "head-4d", "token", "channel", "shared-channel"]
FORMS = {"recurrent": recurrent, "parallel": parallel, "chunked": chunked}


def make(n: int, decay: str, seed: int = 0, forget: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shape = {
        "none": (), "head": (H,), "head-4d": (1, H, 1, 1), "token": (B, H, n, 1), "channel": (B, H, n, DK),
        "shared-channel": (1, H, 1, DK),
    }[decay]  # fmt: skip
    g = None
    if shape:
        g = -3 * randn(*shape).exp()  # from hardly any decay to e^{-60}
        if forget:
            g = g.masked_fill(torch.rand(shape, generator=generator) < 0.2, -torch.inf)
        g = g.masked_fill(torch.rand(shape, generator=generator) < 0.2, 0.0)
    return randn(B, H, n, DK), randn(B, H, n, DK), randn(B, H, n, DV), g, randn(B, H, DK, DV)


def by_definition(q, k, v, g, state):
    """S ← diag(e^g) S + k vᵀ, row by row, head by head, token by token: shares nothing with the library."""
    n = q.shape[2]
    g = torch.zeros(B, H, n, DK, dtype=q.dtype) if g is None else g
    g = g[None, :, None, None] if g.ndim == 1 else g
    g = g.expand(B, H, n, DK)
    out, final = torch.zeros(B, H, n, DV, dtype=q.dtype), torch.empty_like(state)
    for b in range(B):
        for h in range(H):
            s = state[b, h]
            for t in range(n):
                s = torch.diag(torch.exp(g[b, h, t])) @ s + torch.outer(k[b, h, t], v[b, h, t])
                out[b, h, t] = s.T @ q[b, h, t]
            final[b, h] = s
    return out, final


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("n", [1, 2, 16, 37])
def test_every_form_is_the_definition(n: int, decay: str) -> None:
    inputs = make(n, decay)
    want_out, want_state = by_definition(*inputs)
    for form in (recurrent, parallel, chunked, partial(chunked, chunk_size=16), partial(chunked, chunk_size=5)):
        out, state = form(*inputs)
        torch.testing.assert_close(out, want_out, rtol=0, atol=1e-10)
        torch.testing.assert_close(state, want_state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_agree_through_output_and_state_with_exact_forgetting(decay: str) -> None:
    def gradients(form):
        tensors = [x.clone().requires_grad_() for x in make(21, decay, seed=3) if x is not None]
        q, k, v, *rest = tensors
        g, s = rest if len(rest) == 2 else (None, rest[0])
        out, state = form(q, k, v, g, s)
        (out.sin().sum() + state.cos().sum()).backward()
        return [x.grad for x in tensors]

    want = gradients(recurrent)
    for form in (parallel, partial(chunked, chunk_size=8)):
        for got, expected in zip(gradients(form), want, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_gradcheck(decay: str) -> None:
    q, k, v, g, s = (x[:1] if x.shape[0] == B else x for x in make(5, decay, forget=False))
    tensors = [x.clone().requires_grad_() for x in (q, k, v, g, s)]
    assert torch.autograd.gradcheck(lambda *a: chunked(*a, chunk_size=2), tensors, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_cut_in_two_is_one_run(form: str) -> None:
    q, k, v, g, s = make(30, "channel")
    run = FORMS[form]
    out, state = run(q, k, v, g, s)
    first, middle = run(*(x[:, :, :13] for x in (q, k, v, g)), s)
    second, last = run(*(x[:, :, 13:] for x in (q, k, v, g)), middle)
    torch.testing.assert_close(torch.cat([first, second], 2), out, rtol=0, atol=1e-10)
    torch.testing.assert_close(last, state, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_forgetting_at_its_first_token_keeps_a_packed_document_apart(form: str) -> None:
    q, k, v, _, s = make(20, "none")
    g = torch.zeros(1, 1, 20, 1, dtype=q.dtype)
    g[:, :, 12] = -torch.inf
    out, _ = FORMS[form](q, k, v, g, s)
    alone, _ = FORMS[form](*(x[:, :, 12:] for x in (q, k, v)), None, None)
    torch.testing.assert_close(out[:, :, 12:], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_state_as_it_was(form: str) -> None:
    q, k, v, g, s = make(0, "token")
    out, state = FORMS[form](q, k, v, g, s)
    assert out.shape == (B, H, 0, DV) and torch.equal(state, s)


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    q, k, v, g, _ = (x.bfloat16() for x in make(70, "token"))
    out, state = chunked(q, k, v, g)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact, _ = recurrent(*(x.double() for x in (q, k, v, g)))
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding, of the output


def test_long_strong_decay_neither_overflows_nor_vanishes_where_the_naive_factorisation_does() -> None:
    n = 16384
    q, k, v = (torch.randn(1, 1, n, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    log_decay = torch.tensor([0.5]).log()
    out, _ = chunked(q, k, v, log_decay)
    exact, _ = chunked(q.double(), k.double(), v.double(), log_decay.double())
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-4)
    t = torch.arange(n)[None, None, :, None]
    naive = (k * (-t * log_decay).exp()).mT.contiguous()
    assert not naive.isfinite().all()


def test_memory_and_time_are_linear_no_tensor_of_n_by_d_by_dv_and_none_of_n_by_n() -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))
            return result

    n, d = 512, 32
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    for g in (None, -torch.rand(1), -torch.rand(1, 1, n, 1), -torch.rand(1, 1, n, d)):
        sizes.clear()
        with Watch():
            chunked(q, k, v, g, chunk_size=32)
        assert max(sizes) <= n * d, g if g is None else g.shape  # N·max(C, D, D·Dv/C) = N·32


def test_sums_of_decays_count_exactly_the_tokens_they_say() -> None:
    g = torch.tensor([1.0, 10.0, 100.0, 1000.0])[:, None]
    assert from_start(g).flatten().tolist() == [1, 11, 111, 1111]
    assert to_end(g).flatten().tolist() == [1110, 1100, 1000, 0]
    no = -float("inf")
    assert between(g[:, 0]).tolist() == [[0, no, no, no], [10, 0, no, no], [110, 100, 0, no], [1110, 1100, 1000, 0]]


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q", lambda a: a | {"q": a["q"][0]}),
        ("k", lambda a: a | {"k": a["k"][..., :2]}),
        ("v", lambda a: a | {"v": a["v"][:, :, :2]}),
        ("log_decay", lambda a: a | {"log_decay": torch.zeros(H + 1)}),
        ("log_decay", lambda a: a | {"log_decay": torch.zeros(B, H, 3, 1)}),
        ("log_decay", lambda a: a | {"log_decay": torch.zeros(B, H)}),
        ("state", lambda a: a | {"state": torch.zeros(B, H, DV, DK)}),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_shape_is_named(form: str, argument: str, change) -> None:
    q, k, v, g, s = make(4, "token")
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        FORMS[form](**change({"q": q, "k": k, "v": v, "log_decay": g, "state": s}))


def test_a_chunk_of_no_tokens_is_refused() -> None:
    q, k, v, g, s = make(4, "token")
    with pytest.raises(ArgumentError, match="chunk_size: got 0"):
        chunked(q, k, v, g, s, chunk_size=0)
