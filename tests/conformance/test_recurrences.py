"""What every registered recurrence must pass: `example()` gives (recurrence, float64 inputs)."""

from __future__ import annotations

from typing import Any

import torch
from tests.conformance.cases import check
from torch import Tensor

from regard.errors import UnsupportedError
from regard.recurrence.dsf import linear_system, mixing_matrix
from regard.registry import lookup

EXACT = {"rtol": 0.0, "atol": 1e-10}


def example(key: str) -> tuple[Any, Any]:
    """The recurrence and inputs of at least a few tokens."""
    made = lookup("recurrence", key).example
    assert made is not None, f"recurrence {key} has to give an example"
    torch.manual_seed(0)
    recurrence, inputs = made()
    assert inputs.length >= 8
    return recurrence, inputs


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


def changed(inputs: Any, change: Any) -> Any:
    """The inputs with every floating-point tensor changed by the function."""
    return type(inputs)(*(change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs))


@check("step = scan", kind="recurrence")
def test_steps_are_the_scan(key: str) -> None:
    recurrence, inputs = example(key)
    out, final = recurrence.scan(inputs)
    state, outs = recurrence.init(inputs), []
    for t in range(inputs.length):
        state, one = recurrence.step(state, inputs.tokens(t, t + 1))
        outs.append(one)
    same((torch.cat(outs, 2), *state), (out, *final))


@check("state hand-over", kind="recurrence")
def test_a_run_cut_anywhere_is_one_run(key: str) -> None:
    recurrence, inputs = example(key)
    out, final = recurrence.scan(inputs)
    for cut in (1, inputs.length // 2, inputs.length - 1):
        first, state = recurrence.scan(inputs.tokens(0, cut))
        second, last = recurrence.scan(inputs.tokens(cut, inputs.length), state)
        same((torch.cat([first, second], 2), *last), (out, *final))


@check("causal", kind="recurrence")
def test_the_future_changes_nothing_bitwise(key: str) -> None:
    recurrence, inputs = example(key)
    out, _ = recurrence.scan(inputs)
    n, t = inputs.length, inputs.length // 2
    head = inputs.tokens(0, t)
    other = changed(inputs.tokens(t, n), lambda x: 2 * x)
    joined = type(inputs)(
        *(
            torch.cat([a, b], _time(whole, a)) if isinstance(whole, Tensor) and a.shape != whole.shape else whole
            for whole, a, b in zip(inputs, head, other, strict=True)
        )
    )
    again, _ = recurrence.scan(joined)
    assert torch.equal(again[:, :, :t], out[:, :, :t]) and not torch.equal(again[:, :, t:], out[:, :, t:])


def _time(whole: Tensor, part: Tensor) -> int:
    """The axis along which a part is shorter."""
    return next(i for i, (a, b) in enumerate(zip(whole.shape, part.shape, strict=True)) if a != b)


@check("gradients", kind="recurrence")
def test_gradients_of_scan_are_those_of_steps(key: str) -> None:
    recurrence, inputs = example(key)
    grads = []
    for stepped in (False, True):
        leaves = changed(inputs, lambda x: x.clone().requires_grad_())
        if stepped:
            state, outs = recurrence.init(leaves), []
            for t in range(leaves.length):
                state, one = recurrence.step(state, leaves.tokens(t, t + 1))
                outs.append(one)
            out = torch.cat(outs, 2)
        else:
            out, state = recurrence.scan(leaves)
        (out.sin().sum() + sum(s.cos().sum() for s in state)).backward()
        grads.append(tuple(x.grad for x in leaves if isinstance(x, Tensor) and x.requires_grad))
    assert all(g.isfinite().all() for g in grads[0])
    same(*grads)


@check("float32 state", kind="recurrence")
def test_states_are_held_in_float32(key: str) -> None:
    recurrence, inputs = example(key)
    exact, _ = recurrence.scan(inputs)
    out, state = recurrence.scan(changed(inputs, lambda x: x.bfloat16()))
    assert out.dtype == torch.bfloat16 and all(s.dtype == torch.float32 for s in state)
    assert (out.double() - exact).abs().max() <= 0.05 * exact.abs().max()


VALUES: dict[str, str] = {"hgrn": "u", "ssd": "x"}
"""Which input a recurrence is linear in, where it is not `v`."""


@check("dense matrix", kind="recurrence")
def test_outputs_are_one_lower_triangular_matrix_times_the_values(key: str) -> None:
    """Φ u = scan(u) for the Φ of unit values, and for that of (Λ, B, C, D) where it is known.

    What is not linear in its values, or mixes their channels, has a row in EXEMPTIONS that says so."""
    recurrence, inputs = example(key)
    values = VALUES.get(key, "v")
    want, _ = recurrence.scan(inputs)
    phi = mixing_matrix(recurrence, inputs, values)
    assert torch.equal(phi.triu(1), torch.zeros_like(phi)) and phi.tril(-1).abs().max() > 0
    u = getattr(inputs, values)
    torch.testing.assert_close((phi @ u.mT[..., None])[..., 0].mT, want, **EXACT)
    try:
        system = linear_system(recurrence, inputs)
    except UnsupportedError:
        return
    dense = system.matrix().unflatten(1, (phi.shape[1], -1))  # all channels of a head alike, or a head per channel
    torch.testing.assert_close(dense.expand_as(phi), phi, **EXACT)
