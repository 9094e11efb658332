"""What the card of MoH asks to be shown, but for the trained comparison and the speed (those are evidence)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.layers.moh import MixtureOfHeads, load_balance
from regard.layers.multi_head_attention import MultiHeadAttention
from regard.patterns import Pattern, causal, per_head, sliding_window

DIM, HEADS, N = 16, 8, 11
EXACT = {"rtol": 0.0, "atol": 1e-12}


def make(**settings) -> MixtureOfHeads:
    torch.manual_seed(0)
    return MixtureOfHeads(DIM, HEADS, **{"shared_heads": 2, "top_k": 3, **settings}).double()


def tokens(n: int = N, seed: int = 1) -> Tensor:
    return torch.randn(2, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(layer: MixtureOfHeads, x: Tensor) -> Tensor:
    """Σ_h g_h(t) O_h(t) W_O^h, token by token and head by head, with the gates of the public code."""
    d, out = layer.head_dim, torch.zeros_like(x)
    q, k, v = (p(x).unflatten(-1, (HEADS, d)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    for b in range(len(x)):
        for t in range(x.shape[1]):
            shared = (layer.shared_router.weight @ x[b, t]).softmax(0)
            routed = (layer.head_router.weight @ x[b, t]).softmax(0)
            a1, a2 = (layer.type_router.weight @ x[b, t]).softmax(0)
            best = sorted(range(HEADS - 2), key=lambda h: -routed[h].item())[:3]
            gates = {h: 2 * a1 * 2 * shared[h] for h in range(2)}
            gates |= {2 + h: 2 * a2 * 3 * routed[h] / routed[best].sum() for h in best}
            for h, gate in gates.items():
                o = (k[b, :, h] @ q[b, t, h] / d**0.5).softmax(0) @ v[b, :, h]
                out[b, t] += gate * layer.o_proj.weight[:, h * d : (h + 1) * d] @ o
    return out


def test_it_is_the_sum_over_the_heads_a_token_uses() -> None:
    layer = make()
    torch.testing.assert_close(layer(tokens()).out, by_hand(layer, tokens()), **EXACT)


def test_the_papers_own_gates_are_not_rescaled() -> None:
    layer, x = make(rescaled=False), tokens()
    a = layer.type_router(x).softmax(-1)
    routed = layer.head_router(x).softmax(-1)
    gates, selected = layer.route(x).gates, layer.route(x).selected
    torch.testing.assert_close(gates[..., :2], a[..., :1] * layer.shared_router(x).softmax(-1), **EXACT)
    torch.testing.assert_close(gates[..., 2:], a[..., 1:] * routed * selected[..., 2:], **EXACT)


@pytest.mark.parametrize(("shared", "top_k"), [(0, 3), (8, 0), (2, 0), (0, 8), (2, 3), (2, 6)])
def test_with_a_router_of_zeros_every_active_head_weighs_one(shared: int, top_k: int) -> None:
    dense = MultiHeadAttention(DIM, HEADS, kv_heads=2, bias=True, rotary=True).double()
    layer = MixtureOfHeads.from_dense(dense, shared_heads=shared, top_k=top_k)
    x = tokens()
    out, _, aux = layer(x)
    assert (aux.selected.sum(-1) == shared + top_k).all()
    torch.testing.assert_close(aux.gates, aux.selected.double(), **EXACT)
    if shared + top_k == HEADS:
        torch.testing.assert_close(out, dense(x).out, **EXACT)


PATTERNS: list[Pattern | None] = [
    None,
    causal(),
    per_head([causal() & sliding_window(h + 1) for h in range(HEADS)]),
]


@pytest.mark.parametrize("padded", ["no", "left", "right"])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("pattern", PATTERNS, ids=["full", "causal", "per head"])
def test_gathered_is_masked_forward_and_backward(pattern: Pattern | None, kv_heads: int, padded: str) -> None:
    real = None
    if padded != "no":
        real = torch.ones(2, N, dtype=torch.bool)
        real[1, slice(0, 4) if padded == "left" else slice(7, N)] = False
    results = []
    for gathered in (False, True):
        layer, x = make(kv_heads=kv_heads, gathered=gathered), tokens().requires_grad_()
        out, _, aux = layer(x, pattern=pattern, key_padding=real)
        (out.sin().sum() + aux.load_balance).backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    for masked, compact in zip(*results, strict=True):
        torch.testing.assert_close(compact, masked, **EXACT)


def test_gathered_is_masked_with_a_context_and_while_decoding() -> None:
    masked, gathered = make(), make(gathered=True)
    x, context = tokens(), tokens(5, seed=2)
    torch.testing.assert_close(gathered(x, context).out, masked(x, context).out, **EXACT)
    _, state, _ = masked(x[:, :-1], pattern=causal())
    one = [layer(x[:, -1:], pattern=causal(), state=state).out for layer in (gathered, masked)]
    torch.testing.assert_close(*one, **EXACT)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_head_that_no_token_chose_gets_exactly_no_gradient(gathered: bool) -> None:
    layer, x = make(gathered=gathered), tokens()
    x[..., 0] = 1.0  # a channel that says the same for all tokens, and a router that reads only it
    layer.head_router.weight.data.zero_()[:, 0] = torch.tensor([0.0, 3.0, 1.0, 5.0, 0.5, 4.0])
    out, _, aux = layer(x)
    used = aux.selected.any((0, 1))
    assert used.tolist() == [True, True, False, True, False, True, False, True]
    out.square().sum().backward()
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        per_head_norm = projection.weight.grad.unflatten(0, (HEADS, -1)).abs().sum((1, 2))
        assert (per_head_norm[~used] == 0).all() and (per_head_norm[used] > 0).all()


def test_load_balance_is_k_when_uniform_and_more_when_concentrated() -> None:
    experts, k, n = 6, 2, 12
    uniform = torch.full((1, n, experts), 1 / experts)
    evenly = torch.zeros(1, n, experts, dtype=torch.bool)
    for t in range(n):
        evenly[0, t, [(2 * t) % experts, (2 * t + 1) % experts]] = True
    assert load_balance(uniform, evenly).item() == pytest.approx(k)
    same = torch.zeros_like(evenly)
    same[..., :k] = True
    assert load_balance(uniform, same).item() == pytest.approx(
        k
    )  # with uniform scores whichever heads the ties fall on
    concentrated = torch.where(same, 0.45, 0.025)
    assert load_balance(concentrated, same).item() > 2 * k


def test_padding_is_not_in_the_loss() -> None:
    layer, x = make(), tokens()
    real = torch.ones(2, N, dtype=torch.bool)
    real[1, 6:] = False
    loss = layer(x, key_padding=real).aux.load_balance
    changed = torch.where(real[..., None], x, 50 * tokens(seed=8))
    assert torch.equal(layer(changed, key_padding=real).aux.load_balance, loss)
    assert not torch.equal(layer(changed).aux.load_balance, layer(x).aux.load_balance)
    scores, selected = layer.head_router(x).softmax(-1), layer.route(x).selected[..., 2:]
    alone = load_balance(scores[real][None], selected[real][None])
    torch.testing.assert_close(loss, alone, **EXACT)


def test_the_router_learns_from_the_loss_and_from_the_task() -> None:
    for part in ("task", "loss"):
        layer = make()
        out, _, aux = layer(tokens())
        (out.square().sum() if part == "task" else aux.load_balance).backward()
        assert layer.head_router.weight.grad.abs().sum() > 0


def test_bfloat16_gates_stay_finite_and_near_the_exact_ones() -> None:
    layer, x = make(), tokens()
    layer.head_router.weight.data *= 100  # scores of 0 and 1
    exact = layer.route(x)
    low = make()
    low.load_state_dict(layer.state_dict())
    rough = low.bfloat16().route(x.bfloat16())
    assert rough.gates.dtype == torch.bfloat16 and rough.gates.isfinite().all()
    assert (rough.selected.sum(-1) == exact.selected.sum(-1)).all()


@pytest.mark.parametrize("pattern", [None, causal(), per_head([sliding_window(n + 1) for n in range(HEADS)])])
def test_gathered_without_rows_or_tokens(pattern: Pattern | None) -> None:
    layer, x = make(gathered=True, kv_heads=4), tokens()
    for few in (x[:0], x[:, :0]):
        assert layer(few, pattern=pattern).out.shape == few.shape


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("shared_heads", {"shared_heads": 9}),
        ("shared_heads", {"shared_heads": -1}),
        ("top_k", {"shared_heads": 2, "top_k": 7}),
        ("top_k", {"shared_heads": 0, "top_k": 0}),
        ("kv_heads", {"kv_heads": 3}),
    ],
)
def test_bad_settings_are_named(argument: str, settings: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=rf"^{argument}: got"):
        make(**settings)
