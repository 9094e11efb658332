"""Softmax attention as an associative scan: what the card of Aaren asks to be shown."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.recurrence.prefix_softmax import (
    PrefixInputs,
    PrefixSoftmax,
    SoftmaxState,
    chunked,
    fold,
    merge,
    parallel,
    read,
    recurrent,
)

INF = float("inf")
FORMS = {
    "recurrent": recurrent,
    "parallel": parallel,
    **{f"chunked {c}": lambda *a, c=c: chunked(*a, chunk_size=c) for c in (1, 3, 16, 64)},
}


def scores_of(kind: str, n: int) -> Tensor:
    t = torch.arange(n, dtype=torch.float64)
    made = {
        "random": torch.randn(n, dtype=torch.float64),
        "huge": torch.where(torch.rand(n) < 0.5, 1e4, -1e4).double() + torch.rand(n, dtype=torch.float64),
        "increasing": 30 * t,
        "decreasing": -30 * t,
        "equal": torch.full((n,), 7.0, dtype=torch.float64),
        "some left out": torch.randn(n, dtype=torch.float64).masked_fill(t % 3 != 2, -INF),
        "all left out": torch.full((n,), -INF, dtype=torch.float64),
    }[kind]
    return made.expand(2, 2, n) + torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None]


def masked_softmax(scores: Tensor, v: Tensor) -> Tensor:
    """A softmax over each row of a lower triangle; rows without a key give 0."""
    n = v.shape[2]
    rows = scores[:, :, None].expand(-1, -1, n, -1).masked_fill(torch.ones(n, n).triu(1).bool(), -INF)
    return torch.softmax(rows, -1).nan_to_num(0.0) @ v


KINDS = ["random", "huge", "increasing", "decreasing", "equal", "some left out", "all left out"]


@pytest.mark.parametrize("n", [1, 2, 63, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_are_the_masked_softmax(kind: str, n: int) -> None:
    scores, v = scores_of(kind, n), torch.randn(2, 2, n, 5, dtype=torch.float64)
    want = masked_softmax(scores, v)
    for form in FORMS.values():
        out, state = form(scores, v)
        torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(read(state), want[:, :, -1], rtol=0, atol=1e-12)
        single, _ = form(scores.float(), v.float())
        torch.testing.assert_close(single.double(), masked_softmax(scores.float().double(), v), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_masked_softmax(kind: str) -> None:
    made, v0 = scores_of(kind, 19), torch.randn(2, 2, 19, 3, dtype=torch.float64)

    def gradients(form) -> list[Tensor]:
        scores, v = made.clone().requires_grad_(), v0.clone().requires_grad_()
        form(scores, v).sin().sum().backward()
        return [scores.grad, v.grad]

    def plain(scores: Tensor, v: Tensor) -> Tensor:  # e^{s} with one finite reference point per row; none where empty
        rows = scores[:, :, None].expand(-1, -1, 19, -1)
        seen = torch.ones(19, 19).tril().bool() & (rows > -INF)
        top = rows.masked_fill(~seen, -INF).amax(-1, keepdim=True).detach()
        weight = torch.where(seen, (torch.where(seen, rows, 0.0) - top.masked_fill(top == -INF, 0.0)), -INF).exp()
        total = weight.sum(-1, keepdim=True)
        return weight / torch.where(total == 0, 1.0, total) @ v

    want = gradients(plain)
    assert all(g.isfinite().all() for g in want)
    for form in FORMS.values():
        for got, expected in zip(gradients(lambda s, v, form=form: form(s, v)[0]), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def triples() -> list[SoftmaxState]:
    """States with ordinary, huge and absent scores."""
    made = []
    for shift in (0.0, 1e4, -1e4):
        scores, v = shift + torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 3, 4, dtype=torch.float64)
        scores[torch.rand(40) < 0.3] = -INF
        made.append(fold(scores, v))
    return made


def close(a: SoftmaxState, b: SoftmaxState) -> None:
    for x, y in zip(a, b, strict=True):
        assert not x.isnan().any()
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


def test_merge_is_associative_commutative_and_has_an_identity() -> None:
    a, b, c = triples()
    close(merge(merge(a, b), c), merge(a, merge(b, c)))
    close(merge(a, b), merge(b, a))
    nothing = SoftmaxState(torch.full((40,), -INF).double(), torch.zeros(40).double(), torch.zeros(40, 4).double())
    close(merge(nothing, a), a)
    close(merge(a, nothing), a)
    close(merge(nothing, nothing), nothing)


def test_many_queries_over_blocks_of_keys_in_any_order_are_softmax_attention() -> None:
    q, k, v = (torch.randn(2, 2, n, 4, dtype=torch.float64) for n in (5, 12, 12))
    scores = 10 * q @ k.mT
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=10.0)
    blocks = [fold(scores[..., j : j + 4], v[:, :, None, j : j + 4]) for j in (0, 4, 8)]
    for order in itertools.permutations(blocks):
        torch.testing.assert_close(read(merge(merge(*order[:2]), order[2])), want, rtol=0, atol=1e-12)


def test_a_running_sum_would_overflow_where_this_does_not() -> None:
    scores = torch.tensor([0.0, 200.0, 100.0])[None, None]
    v = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
    assert scores.exp().cumsum(-1).isinf().any()
    assert PrefixSoftmax().scan(PrefixInputs(scores, v))[0].flatten().tolist() == [1.0, 2.0, 2.0]


def test_the_state_does_not_grow() -> None:
    sizes = {
        sum(x.numel() for x in PrefixSoftmax().scan(PrefixInputs(torch.randn(1, 2, n), torch.randn(1, 2, n, 8)))[1])
        for n in (1, 10, 300)
    }
    assert sizes == {2 * (8 + 2)}


def test_wrong_shapes_are_named() -> None:
    scores, v = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, 4)
    mixer = PrefixSoftmax()
    with pytest.raises(ArgumentError, match=r"^scores: got \(1, 2, 2\)"):
        mixer.scan(PrefixInputs(scores[..., 1:], v))
    with pytest.raises(ArgumentError, match=r"^v: got"):
        mixer.scan(PrefixInputs(scores, v[0]))
    with pytest.raises(ArgumentError, match=r"^state: got"):
        mixer.scan(PrefixInputs(scores, v), mixer.scan(PrefixInputs(scores, v[..., :2]))[1])
    with pytest.raises(ArgumentError, match=r"^chunk_size: got 0"):
        PrefixSoftmax(chunk_size=0).scan(PrefixInputs(scores, v))
