"""The diagonal-decay kernels against the torch reference in float64, forward and all gradients.

Run as a program: without arguments the tiny cases, for Triton's interpreter; with a kind of decay and a
dtype, on a GPU.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from regard.kernels.triton import diagonal as kernels
from regard.recurrence import DiagonalDecay, DiagonalInputs, DiagonalState
from regard.recurrence import diagonal_decay as mixer
from regard.recurrence.delta_rule import DeltaInputs, DeltaRule, DeltaState
from regard.recurrence.documents import scan_documents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "state", "dq", "dk", "dv", "dg", "dstate")


def log_decay(kind: str, batch: int, heads: int, n: int, dim: int) -> Tensor | None:
    """none; fixed per head; scalar and channel gates; "strong" ones forget all within a chunk, but
    not within 16 tokens; "extreme": gates of −30, −inf and 0 among them."""
    if kind == "none":
        return None
    if kind == "fixed":
        return -torch.rand(heads) * 3
    g = -torch.rand(batch, heads, n, 1 if "scalar" in kind else dim) * (6.0 if "strong" in kind else 0.2)
    if "extreme" in kind:
        u = torch.rand_like(g)
        g = g.masked_fill(u < 0.1, -30.0).masked_fill((u > 0.9) & (u < 0.95), 0.0).masked_fill(u > 0.95, -torch.inf)
    return g


def errors(
    kind: str,
    n: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    *,
    batch: int = 2,
    heads: int = 2,
    ends: tuple[int, ...] | None = None,
    carried: bool = True,
) -> dict[str, float]:
    """Relative errors (Frobenius) against float64."""
    sequences = batch if ends is None else len(ends) - 1
    batch = batch if ends is None else 1
    q, k, v = (torch.randn(batch, n, heads, d).transpose(1, 2) * 0.5 for d in (dims[0], *dims))
    g, s = log_decay(kind, batch, heads, n, dims[0]), torch.randn(sequences, heads, *dims) if carried else None
    given = [x if x is None else x.to(DEVICE) for x in (q.to(dtype), k.to(dtype), v.to(dtype), g, s)]
    weights: list[Tensor] = []
    results = []
    for executor, cast in (("triton", lambda x: x), ("torch", lambda x: x.double())):
        leaves = [x if x is None else cast(x.detach()).requires_grad_() for x in given]
        inputs, recurrence = DiagonalInputs(*leaves[:4]), DiagonalDecay(executor=executor)  # type: ignore[arg-type]
        state = None if s is None else DiagonalState(leaves[4])  # type: ignore[arg-type]
        if ends is None:
            out, final = recurrence.scan(inputs, state)
        else:
            out, final = scan_documents(recurrence, inputs, ends, state)
        weights = weights or [torch.randn_like(x.double()) for x in (out, final.s)]
        loss = (out.double() * weights[0]).sum() + (final.s.double() * weights[1]).sum()
        held = [x for x in leaves if x is not None]
        grads = iter(torch.autograd.grad(loss, held))
        results.append([out, final.s, *(None if x is None else next(grads) for x in leaves)])
    found = {}
    for name, ours, truth in zip(NAMES, *results, strict=True):
        if ours is not None:
            assert ours.isfinite().all(), (kind, n, dims, name)
            found[name] = ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-9)).item()
    return found


def expect(limit: float, found: dict[str, float], kind: str, *about: object) -> None:
    """dg, a difference of two long sums, is given four times as much, and ten times that where the differences of all
    tokens add up to one number (a fixed decay)."""
    slack = {"dg": 40 if kind == "fixed" else 4}
    worst = max(error / slack.get(name, 1) for name, error in found.items())
    assert worst < limit, (kind, about, found)
    print(kind, *about, {name: f"{error:.1e}" for name, error in found.items()})


def steps() -> None:
    """Five tokens one at a time, without a gradient, are the scan of five."""
    for kind in ("none", "fixed", "scalar", "channel"):
        q, k, v = (torch.randn(2, 3, 5, d, device=DEVICE) for d in (16, 16, 24))
        g = log_decay(kind, 2, 3, 5, 16)
        inputs = DiagonalInputs(q, k, v, None if g is None else g.to(DEVICE))
        state = DiagonalState(torch.randn(2, 3, 16, 24, device=DEVICE))
        want, last = DiagonalDecay(executor="torch").scan(inputs, state)
        outs = []
        for t in range(5):
            state, out = DiagonalDecay(executor="triton").step(state, inputs.tokens(t, t + 1))
            outs.append(out)
        torch.testing.assert_close(torch.cat(outs, 2), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.s, last.s, rtol=1e-4, atol=1e-4)
    q, k, v = (torch.randn(2, 3, 5, d, device=DEVICE) for d in (16, 16, 24))
    told = DeltaInputs(
        q, k / k.norm(dim=-1, keepdim=True), v, torch.rand(2, 3, 5).to(DEVICE), -torch.rand(3).to(DEVICE)
    )
    held = DeltaState(torch.randn(2, 3, 16, 24, device=DEVICE))
    want, final = DeltaRule(executor="torch").scan(told, held)
    got, end = DeltaRule(executor="triton").scan(told, held)
    torch.testing.assert_close((got, end.s), (want, final.s), rtol=1e-4, atol=1e-4)
    for t in range(5):
        held, out = DeltaRule(executor="triton").step(held, told.tokens(t, t + 1))
        torch.testing.assert_close(out, want[:, :, t : t + 1], rtol=1e-4, atol=1e-4)


def parts() -> None:
    """More columns of values than the kernels take go in parts."""
    held, mixer.MAX_DIM = mixer.MAX_DIM, 16
    for kind in ("scalar", "channel"):
        expect(2e-5, errors(kind, 20, (16, 40), torch.float32), kind, "parts")
    mixer.MAX_DIM = held


def nothing_is_copied() -> None:
    """Between the kernels' function and inputs that it takes as they are, autograd meets views alone: the gradients of
    a split and of an index would be copies of whole tensors."""
    for kind in ("none", "scalar", "channel"):
        q, k, v = (torch.randn(1, 5, 2, 16, device=DEVICE).transpose(1, 2).requires_grad_() for _ in range(3))
        g = log_decay(kind, 1, 2, 5, 16)
        told = DiagonalInputs(q, k, v, None if g is None else g.to(DEVICE).requires_grad_())
        out, _ = DiagonalDecay(executor="triton").scan(told)  # while it lives, its nodes do
        waiting, met = [out.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is not None and node.name() not in met:
                met.add(node.name())
                waiting += [before for before, _ in node.next_functions]
        views = {"ExpandBackward0", "SqueezeBackward1", "torch::autograd::AccumulateGrad"}
        assert met <= views | {"_DiagonalBackward", "ChannelDecayBackward"}, met


def small() -> None:
    """What the interpreter can do in seconds."""
    exact = 2e-5
    for kind in ("none", "fixed", "scalar", "channel"):
        for n, dims in ((1, (16, 16)), (33, (16, 24)), (70, (24, 16))):
            expect(exact, errors(kind, n, dims, torch.float32), kind, n, dims)
    for kind in ("scalar strong", "channel strong", "scalar extreme", "channel extreme"):
        expect(exact, errors(kind, 70, (16, 16), torch.float32, batch=1), kind)
    kernels.WHOLE, kernels.PIECE = 64, 32  # so that so short a sequence is cut
    for kind in ("none", "scalar", "channel"):
        expect(exact, errors(kind, 75, (16, 16), torch.float32, ends=(0, 1, 34, 75)), kind, "documents")
        expect(exact, errors(kind, 40, (16, 16), torch.float32, carried=False), kind, "no state")
        expect(exact, errors(kind, 200, (16, 16), torch.float32, batch=1), kind, "cut")
        expect(exact, errors(kind, 130, (16, 24), torch.float32, batch=2, heads=1, carried=False), kind, "cut")
    kernels.WHOLE, kernels.PIECE = 256, 128  # pieces of several chunks, of which the first are forgotten by the end
    for kind in ("scalar strong", "scalar extreme", "channel strong"):
        expect(exact, errors(kind, 384, (16, 16), torch.float32, batch=1, heads=1), kind, "cut")


DTYPES = {"float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 0.02), "float16": (torch.float16, 0.02)}


def large(kind: str, name: str) -> None:
    """Lengths and sizes in use."""
    dtype, limit = DTYPES[name]
    sizes = [(n, (64, 64)) for n in (1, 63, 64, 65, 500, 2049)]
    sizes += [(130, dims) for dims in ((32, 64), (128, 128), (256, 128), (100, 256))]
    for n, dims in sizes:
        found = errors(kind, n, dims, dtype, batch=1)
        if kind == "fixed" and dtype != torch.float32:
            found["dg"] = 0.0  # what is left of the differences of all tokens is under half precision's noise
        expect(limit, found, kind, n, dims, dtype)
    kernels.WHOLE, kernels.PIECE = 2048, 1024
    cut = errors(kind, 4000, (64, 64), dtype, batch=1, heads=1)
    expect(limit, cut | ({"dg": 0.0} if "dg" in cut else {}), kind, "cut", dtype)  # so long a sum has lost its digits
    packed = errors(kind, 3000, (64, 64), dtype, ends=(0, 700, 701, 3000))
    expect(limit, packed | ({"dg": 0.0} if "dg" in packed else {}), kind, "documents", dtype)
    expect(limit, errors(kind, 600, (128, 128), dtype, batch=4, heads=16) | {"dg": 0.0}, kind, "many heads", dtype)


if __name__ == "__main__":
    torch.manual_seed(0)
    steps()
    parts()
    nothing_is_copied()
    large(*sys.argv[1:]) if sys.argv[1:] else small()
    print("agree")
