"""Packed documents against one scan per document, for every executor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnsupportedError
from regard.recurrence import (
    DeltaInputs,
    DeltaRule,
    DeltaState,
    DiagonalDecay,
    DiagonalInputs,
    DiagonalState,
    LightningAttention2,
    LightningInputs,
)
from regard.recurrence.documents import scan_documents

LENGTHS = [5, 1, 8, 17]
BOUNDS = [0, 5, 6, 14, 31]
N, H, DK, DV = 31, 2, 4, 3
EXACT = {"rtol": 0.0, "atol": 1e-12}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def settings(key: str) -> tuple[Any, list[Any], Any]:
    """The recurrence, its inputs document by document, and their states."""
    torch.manual_seed(0)
    fixed = -torch.rand(H, dtype=torch.float64)
    documents = []
    for n in LENGTHS:
        q, k, v, g = randn(1, H, n, DK), randn(1, H, n, DK), randn(1, H, n, DV), -randn(1, H, n, DK).abs()
        k = k / k.norm(dim=-1, keepdim=True)
        documents.append({
            "diagonal-decay": DiagonalInputs(q, k, v, g),
            "diagonal-fixed": DiagonalInputs(q, k, v, fixed),
            "delta-rule": DeltaInputs(q, k, v, torch.rand(1, H, n, dtype=torch.float64), g[..., 0]),
            "delta-fixed": DeltaInputs(q, k, v, torch.rand(1, H, n, dtype=torch.float64), fixed),
            "lightning": LightningInputs(q, k, v, torch.rand(1, n) < 0.7),
        }[key])  # fmt: skip
    recurrence = {"diagonal": DiagonalDecay(8), "delta": DeltaRule(8)}.get(
        key.split("-")[0], LightningAttention2((-1.0, 0.0), 8)
    )
    state = DeltaState if key.startswith("delta") else DiagonalState
    return recurrence, documents, state(randn(len(LENGTHS), H, DK, DV))


KEYS = ["diagonal-decay", "diagonal-fixed", "delta-rule", "delta-fixed", "lightning"]


def pack(documents: list[Any]) -> Any:
    """All documents on one time axis; what is fixed in time once."""
    fields = zip(*documents, strict=True)
    return type(documents[0])(*(f[0] if f[0].ndim == 1 else torch.cat(f, 1 if f[0].ndim == 2 else 2) for f in fields))


@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from states"])
@pytest.mark.parametrize("key", KEYS)
def test_packed_is_one_scan_per_document_gradients_too(key: str, given: bool) -> None:
    recurrence, documents, states = settings(key)

    def run(packed: bool) -> tuple[list[Tensor], list[Tensor]]:
        def leaf(x: Tensor) -> Tensor:
            return x.clone().requires_grad_() if x.is_floating_point() else x

        inputs = [type(d)(*map(leaf, d)) for d in documents]
        start = type(states)(leaf(states.s))
        if packed:
            cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
            out, final = scan_documents(recurrence, pack(inputs), cu_seqlens, start if given else None)
            got = [out, *final]
        else:
            each = [
                recurrence.scan(d, type(states)(start.s[i : i + 1]) if given else None) for i, d in enumerate(inputs)
            ]
            got = [torch.cat([out for out, _ in each], 2), torch.cat([final.s for _, final in each])]
        sum(x.sin().sum() for x in got).backward()
        # A fixed decay is one tensor for all documents when packed: its gradient is the sum.
        fixed = [sum(d[-1].grad for d in inputs if d[-1].grad is not None)] if key.endswith("fixed") else []
        varying = [x.grad for d in inputs for x in (d[:-1] if fixed else d) if x.is_floating_point()]
        return got, varying + fixed + ([start.s.grad] if given else [])

    for a, b in zip(run(True), run(False), strict=True):
        for got, want in zip(a, b, strict=True):
            torch.testing.assert_close(got, want, **EXACT)


@pytest.mark.parametrize("key", ["diagonal-decay", "delta-rule"])
def test_packed_is_forgetting_at_each_first_token(key: str) -> None:
    """One scan of everything with log decay −inf where a document begins: the same outputs, another way."""
    recurrence, documents, _ = settings(key)
    inputs = pack(documents)
    out, _ = scan_documents(recurrence, inputs, BOUNDS)
    g = inputs.log_decay.clone()
    g[:, :, BOUNDS[:-1]] = -torch.inf
    want, _ = recurrence.scan(inputs._replace(log_decay=g))
    torch.testing.assert_close(out, want, **EXACT)


def test_one_document_is_a_scan() -> None:
    recurrence, documents, _ = settings("delta-rule")
    inputs = pack(documents)
    (out, final), (want, last) = scan_documents(recurrence, inputs, [0, N]), recurrence.scan(inputs)
    assert torch.equal(out, want) and torch.equal(final.s, last.s)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (None, "got None; allowed: ints"),
        ("abc", "got 'abc'; allowed: ints"),
        ([0.0, 31.0], "got torch.float32 of shape"),
        ([[0, 31]], r"of shape \(1, 2\)"),
        ([0], r"of shape \(1,\); allowed: ints \(S \+ 1,\)"),
        ([1, 31], "got first entry 1; allowed: first entry 0"),
        ([0, 14, 14, 31], "got 14 then 14 at entry 2; allowed: strictly ascending"),
        ([0, 20, 6, 31], "got 20 then 6 at entry 2; allowed: strictly ascending"),
        ([0, 6, 30], "got last entry 30; allowed: last entry 31"),
        ([0, 6, 32], "got last entry 32; allowed: last entry 31"),
    ],
)
def test_boundaries_that_do_not_fit_are_named(cu_seqlens: list, message: str) -> None:
    recurrence, documents, _ = settings("diagonal-decay")
    with pytest.raises(ArgumentError, match=f"^cu_seqlens: .*{message}"):
        scan_documents(recurrence, pack(documents), cu_seqlens)


def test_a_batch_and_foreign_states_are_refused() -> None:
    recurrence, documents, states = settings("delta-rule")
    inputs = pack(documents)
    two = DeltaInputs(*(torch.cat([x, x]) for x in inputs))
    with pytest.raises(ArgumentError, match=r"^inputs: got a batch of 2"):
        scan_documents(recurrence, two, BOUNDS)
    with pytest.raises(ArgumentError, match=r"^inputs: got a tuple"):
        scan_documents(recurrence, tuple(inputs), BOUNDS)  # type: ignore[type-var]
    with pytest.raises(ArgumentError, match=r"^states: got DiagonalState; allowed: DeltaState"):
        scan_documents(recurrence, inputs, BOUNDS, DiagonalState(states.s))
    with pytest.raises(ArgumentError, match=r"^states: got s \(3, 2, 4, 3\); allowed: s \(4, 2, 4, 3\)"):
        scan_documents(recurrence, inputs, BOUNDS, DeltaState(states.s[:3]))


def test_a_recurrence_with_its_own_form_is_asked_after_the_checks() -> None:
    class Packed(DeltaRule):
        def scan_documents(self, inputs, cu_seqlens, states):
            return "asked", (inputs, cu_seqlens, states)

    _, documents, states = settings("delta-rule")
    inputs = pack(documents)
    out, (got, cu_seqlens, start) = scan_documents(Packed(), inputs, BOUNDS, states)
    assert out == "asked" and got is inputs and start is states and cu_seqlens.tolist() == BOUNDS
    with pytest.raises(ArgumentError, match="cu_seqlens"):
        scan_documents(Packed(), inputs, [0, 3])


def test_states_that_cannot_be_batched_are_refused() -> None:
    class Open(DeltaRule):
        """Keeps the tokens since the last multiple of 4."""

        def scan(self, inputs, state=None):
            out, _ = super().scan(inputs, None)
            return out, DeltaState(inputs.k[:, :, inputs.length // 4 * 4 :])

    _, documents, _ = settings("delta-rule")
    with pytest.raises(UnsupportedError, match="Open: its documents end in states of different shapes"):
        scan_documents(Open(), pack(documents), BOUNDS)
