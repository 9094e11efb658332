"""The delta rule: three forms, one function, checked against (I − βkkᵀ) written out as a matrix."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.recurrence import DeltaInputs, DeltaRule, delta, diagonal, spans
from regard.recurrence.delta import chunked, parallel, recurrent

B, H, DK, DV = 2, 3, 6, 5
DECAYS = ["none", "head", "shared", "token", "−30", "−inf"]
FORMS = {"recurrent": recurrent, "parallel": parallel, "chunked": partial(chunked, chunk_size=8)}
EXACT = {"rtol": 0.0, "atol": 1e-10}


def make(n: int, decay: str = "token", seed: int = 0) -> tuple:
    """q, unit k, v, β with 0, 1 and 2 among it, log decay, state; float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def some(x: Tensor, value: float) -> Tensor:
        return x.masked_fill(torch.rand(x.shape, generator=generator) < 0.2, value)

    q, k, v, state = randn(B, H, n, DK), randn(B, H, n, DK), randn(B, H, n, DV), randn(B, H, DK, DV)
    beta = 2 * torch.rand(B, H, n, dtype=torch.float64, generator=generator)
    for value in (0.0, 1.0, 2.0):
        beta = some(beta, value)
    shape = {"none": None, "head": (H,), "shared": (1, H, 1)}.get(decay, (B, H, n))
    g = None if shape is None else some(-randn(*shape).exp(), 0.0)
    if g is not None and decay in ("−30", "−inf"):
        g = some(g, -30.0 if decay == "−30" else -torch.inf)
    return q, k / k.norm(dim=-1, keepdim=True), v, beta, g, state


def by_definition(q, k, v, beta, g, state):
    """S ← e^g (I − β k kᵀ) S + β k vᵀ, head by head, token by token: shares nothing with the library."""
    n = q.shape[2]
    g = torch.zeros(B, H, n, dtype=q.dtype) if g is None else g
    g = (g[None, :, None] if g.ndim == 1 else g).expand(B, H, n)
    out, final = torch.zeros(B, H, n, DV, dtype=q.dtype), torch.empty_like(state)
    for b in range(B):
        for h in range(H):
            s = state[b, h]
            for t in range(n):
                key, share = k[b, h, t], beta[b, h, t]
                transition = torch.eye(DK, dtype=q.dtype) - share * torch.outer(key, key)
                s = g[b, h, t].exp() * transition @ s + share * torch.outer(key, v[b, h, t])
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
        torch.testing.assert_close(out, want_out, **EXACT)
        torch.testing.assert_close(state, want_state, **EXACT)


@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_agree_through_output_and_state(decay: str) -> None:
    def gradients(form):
        leaves = [None if x is None else x.clone().requires_grad_() for x in make(21, decay, seed=3)]
        out, state = form(*leaves)
        (out.sin().sum() + state.cos().sum()).backward()
        return [x.grad for x in leaves if x is not None]

    want = gradients(recurrent)
    for form in (parallel, partial(chunked, chunk_size=8)):
        for got, expected in zip(gradients(form), want, strict=True):
            assert got.isfinite().all()
            torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, decay: str) -> None:
    leaves = [None if x is None else (x[:1] if x.shape[0] == B else x) for x in make(5, decay)]
    leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
    run = partial(chunked, chunk_size=2) if form == "chunked" else FORMS[form]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_a_run_cut_in_two_is_one_run(form: str) -> None:
    q, k, v, beta, g, s = make(30, "−inf")
    run = FORMS[form]
    out, state = run(q, k, v, beta, g, s)
    first, middle = run(*(x[:, :, :13] for x in (q, k, v, beta, g)), s)
    second, last = run(*(x[:, :, 13:] for x in (q, k, v, beta, g)), middle)
    torch.testing.assert_close(torch.cat([first, second], 2), out, **EXACT)
    torch.testing.assert_close(last, state, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_state_as_it_was(form: str) -> None:
    *inputs, s = make(0)
    out, state = FORMS[form](*inputs, s)
    assert out.shape == (B, H, 0, DV) and torch.equal(state, s)


@pytest.mark.parametrize("form", FORMS)
def test_neutral_tokens_change_nothing(form: str) -> None:
    """k = 0, v = 0, β = 0, no decay: what padding is given."""
    inputs = list(make(20))
    keep = torch.ones(20, dtype=torch.bool)
    keep[[0, 1, 7, 18, 19]] = False
    alone, last = FORMS[form](*(x[:, :, keep] for x in inputs[:5]), inputs[5])
    for i in (1, 2, 3, 4):
        inputs[i] = inputs[i].clone()
        inputs[i][:, :, ~keep] = 0
    out, state = FORMS[form](*inputs)
    torch.testing.assert_close(out[:, :, keep], alone, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_without_decay_the_gated_rule_is_deltanet(form: str) -> None:
    q, k, v, beta, _, s = make(20)
    want = FORMS[form](q, k, v, beta, None, s)
    got = FORMS[form](q, k, v, beta, torch.zeros(B, H, 20, dtype=q.dtype), s)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_keys_at_full_strength_store_and_overwrite_exactly(form: str) -> None:
    """β = 1: Sᵀk is the last value written at k, whatever stood there; nothing else is disturbed."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(DK, DK, dtype=torch.float64, generator=generator)).Q
    where = torch.tensor([0, 3, 0, 5, 3, 3, 1, 0, 5, 2])
    n = len(where)
    k = basis[where].expand(1, 1, n, DK)
    v = torch.randn(1, 1, n, DV, dtype=torch.float64, generator=generator)
    before = torch.randn(1, 1, DK, DV, dtype=torch.float64, generator=generator)
    _, state = FORMS[form](k, k, v, torch.ones(1, 1, n, dtype=torch.float64), None, before)
    for i, key in enumerate(basis):
        written = (where == i).nonzero().flatten()
        want = v[0, 0, written[-1]] if len(written) else before[0, 0].T @ key
        torch.testing.assert_close(state[0, 0].T @ key, want, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_decay_comes_before_the_write(form: str) -> None:
    """With S = 0 before it, what one token writes is β k vᵀ: not decayed."""
    q, k, v, beta, g, _ = make(1)
    _, state = FORMS[form](q, k, v, beta, g)
    torch.testing.assert_close(state, beta[:, :, 0, None, None] * k.mT @ v, **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_no_direction_of_the_state_grows(beta: float) -> None:
    """‖I − β k kᵀ‖ ≤ 1 for β in [0, 2]: the transition, read off the state that starts as the identity."""
    _, k, *_ = make(12)
    eye = torch.eye(DK, dtype=k.dtype).expand(B, H, DK, DK)
    share = torch.full((B, H, 12), beta, dtype=k.dtype)
    for n in (1, 12):
        _, state = chunked(*(x[:, :, :n] for x in (k, k, torch.zeros_like(k), share)), None, eye, chunk_size=4)
        norm = torch.linalg.matrix_norm(state, 2)
        assert (norm <= 1 + 1e-12).all()
        if beta in (0.0, 2.0):  # nothing, and reflections: orthogonal
            torch.testing.assert_close(state.mT @ state, eye, **EXACT)


def test_bfloat16_inputs_keep_a_float32_state() -> None:
    *inputs, _ = (x.bfloat16() for x in make(70))
    out, state = chunked(*inputs)
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    exact, _ = recurrent(*(x.double() for x in inputs))
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding, of the output


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("executor", [delta, diagonal])
def test_autocast_does_not_reach_the_solve_and_the_state(executor, form: str) -> None:
    q, k, v, beta, *_ = (x.float() for x in make(40))
    given = (q, k, v, beta) if executor is delta else (q, k, v)
    run = getattr(executor, form)
    want = run(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert (q @ k.mT).dtype == torch.bfloat16
        assert all(torch.equal(a, b) for a, b in zip(run(*given), want, strict=True))


@pytest.mark.parametrize("executor", [delta, diagonal])
def test_however_many_chunks_are_worked_on_together(executor, monkeypatch) -> None:
    q, k, v, beta, g, s = make(70)
    given = (q, k, v, beta, g, s) if executor is delta else (q, k, v, g[..., None], s)
    want = executor.recurrent(*given)
    chunks_of_8 = B * H * 8 * (DK + DV)
    for cached, count in ((1, 9), (3 * chunks_of_8, 4), (10**9, 2)):  # 8 whole chunks and 6 tokens
        monkeypatch.setattr(spans, "CACHED", cached)
        assert len(list(spans.spans(q, v, 8))) == count
        for got, expected in zip(executor.chunked(*given, chunk_size=8), want, strict=True):
            torch.testing.assert_close(got, expected, **EXACT)


def test_long_runs_at_every_strength_stay_exact_in_float32() -> None:
    n = 4096
    *inputs, _ = (x[:1, :1].repeat(1, 1, 16, *(1,) * (x.ndim - 3)) for x in make(n // 16))
    out, _ = chunked(*(x.float() for x in inputs))
    exact, _ = chunked(*inputs)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


def test_memory_is_linear_no_tensor_of_n_by_d_by_dv_and_none_of_n_by_n() -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))
            return result

    n, d = 512, 32
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    with Watch():
        chunked(q, k, v, torch.rand(1, 1, n), -torch.rand(1, 1, n), chunk_size=32)
    assert max(sizes) <= 2 * n * d  # right-hand sides for V and K side by side


def test_the_recurrence_is_the_chunked_form() -> None:
    *inputs, s = make(20)
    rule, at = DeltaRule(chunk_size=8), DeltaInputs(*inputs)
    out, state = rule.scan(at)
    want, last = chunked(*inputs, chunk_size=8)
    assert torch.equal(out, want) and torch.equal(state.s, last)
    part = DeltaInputs(*inputs[:4], torch.zeros(H, dtype=s.dtype)).tokens(3, 9)
    assert part.length == 6 and part.beta.shape == (B, H, 6) and part.log_decay.shape == (H,)
    assert at.tokens(3, 9).log_decay.shape == (B, H, 6)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q", lambda a: a | {"q": a["q"][0]}),
        ("k", lambda a: a | {"k": a["k"][..., :2]}),
        ("v", lambda a: a | {"v": a["v"][:, :, :2]}),
        ("beta", lambda a: a | {"beta": a["beta"][..., None]}),
        ("beta", lambda a: a | {"beta": a["beta"][:, :1]}),
        ("log_decay", lambda a: a | {"log_decay": torch.zeros(H + 1)}),
        ("log_decay", lambda a: a | {"log_decay": torch.zeros(B, H, 3)}),
        ("log_decay", lambda a: a | {"log_decay": torch.zeros(B, H, 4, DK)}),
        ("state", lambda a: a | {"state": torch.zeros(B, H, DV, DK)}),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_shape_is_named(form: str, argument: str, change) -> None:
    names = ("q", "k", "v", "beta", "log_decay", "state")
    with pytest.raises(ArgumentError, match=f"^{argument}: got"):
        FORMS[form](**change(dict(zip(names, make(4), strict=True))))


def test_a_chunk_of_no_tokens_is_refused() -> None:
    with pytest.raises(ArgumentError, match="chunk_size: got 0"):
        chunked(*make(4), chunk_size=0)
