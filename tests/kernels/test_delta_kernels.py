"""The Triton kernels of the delta rule against its definition in float64: in Triton's CPU interpreter, or on a GPU.

The interpreter must be chosen before Triton is imported: where there is no GPU, this file runs itself in a process of
its own (`python -m tests.kernels.test_delta_kernels`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError, UnsupportedError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "beta", "log_decay", "state")
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
Inputs = list[Tensor | None]  # in the order of NAMES


def definition(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S' = e^g S; S = S' + β k (v − S'ᵀ k)ᵀ; o = Sᵀ q, token by token in float64."""
    q, k, v, beta = (x.double() for x in (q, k, v, beta))
    held = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state.double()
    out = []
    for t in range(q.shape[2]):
        if log_decay is not None:
            held = log_decay[:, :, t, None, None].double().exp() * held
        key = k[:, :, t, None]
        held = held + beta[:, :, t, None, None] * key.mT @ (v[:, :, t, None] - key @ held)
        out.append(q[:, :, t, None] @ held)
    return torch.cat(out, 2), held


def packed(inputs: Inputs, ends: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The definition, on one document after the other."""
    q, k, v, beta, g, state = inputs
    outs, states = [], []
    for d, (a, b) in enumerate(pairwise(ends)):
        part = [None if x is None else x[:, :, a:b] for x in (q, k, v, beta, g)]
        start = v.new_zeros(1, v.shape[1], q.shape[3], v.shape[3]) if state is None else state[d : d + 1]
        out, held = (v[:, :, :0], start) if a == b else definition(*part, start)
        outs.append(out)
        states.append(held.double())
    return torch.cat(outs, 2), torch.cat(states)


def draw(
    n: int, dim: int, dim_v: int, *, batch: int = 1, heads: int = 2, sequences: int | None = None,
    decay: bool = True, state: bool = True, dtype: torch.dtype = torch.float32,
) -> Inputs:  # fmt: skip
    """Unit keys, β in (0, 2); q, k and v lie as (B, N, H, D) in memory, as a layer's projections leave them."""
    q, k, v = (torch.randn(batch, n, heads, d).transpose(1, 2) for d in (dim, dim, dim_v))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, g = 2 * torch.rand(batch, heads, n), -0.2 * torch.rand(batch, n, heads).transpose(1, 2)
    start = torch.randn(batch if sequences is None else sequences, heads, dim, dim_v)
    made = (q.to(dtype), k.to(dtype), v.to(dtype), beta, g if decay else None, start if state else None)
    return [None if x is None else x.to(DEVICE) for x in made]


def chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor, size: int = 64
) -> tuple[Tensor, Tensor]:
    """Chunks in plain torch, products in q's dtype; decays, solves and states in float32. What half precision costs."""
    outs, dtype, eye = [], q.dtype, torch.eye(size, device=q.device)
    for at in range(0, q.shape[2], size):
        queries, keys, values = (x[:, :, at : at + size] for x in (q, k, v))
        strength, b = beta[:, :, at : at + size, None], log_decay[:, :, at : at + size].cumsum(-1)
        n = b.shape[-1]
        pairs = (b[..., :, None] - b[..., None, :]).tril().exp().tril()
        start, rest = b.exp()[..., None], (b[..., -1:] - b).exp()[..., None]
        system = (strength * pairs * (keys @ keys.mT)).tril(-1) + eye[:n, :n]
        right = torch.cat([strength * values, strength * start * keys], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).to(dtype)
        own, reads = solved.split([v.shape[-1], k.shape[-1]], -1)
        written = own - reads @ state.to(dtype)
        out = start * (queries @ state.to(dtype)) + (pairs * (queries @ keys.mT)).to(dtype) @ written
        outs.append(out.to(dtype))
        state = start[..., -1:, :] * state + (rest * keys).to(dtype).mT @ written
    return torch.cat(outs, 2), state


def kernels(inputs: Inputs, ends: tuple[int, ...] | None = None, **how: int) -> tuple[Tensor, Tensor]:
    """out and final state; `how` replaces what is chosen for the shape."""
    from regard.kernels.triton.delta_rule import delta_rule
    from regard.kernels.triton.delta_rule_layout import launches

    q, v = inputs[0], inputs[2]
    return delta_rule(*inputs, ends=ends, how=replace(launches(q.shape[3], v.shape[3], q.dtype), **how))


Results = dict[str, Tensor]


def results(
    run: Callable[[Inputs], tuple[Tensor, Tensor]], inputs: Inputs, dtype: torch.dtype | None = None
) -> Results:
    """Outputs, final state and all gradients, for the same random gradients whatever runs; inputs are first cast."""
    given = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out, final = run(given)
    draws = torch.Generator().manual_seed(1)
    dout, dfinal = (torch.randn(x.shape, generator=draws).to(inputs[2].dtype).to(x) for x in (out, final))
    present = {name: x for name, x in zip(NAMES, given, strict=True) if x is not None}
    found = torch.autograd.grad((out, final), list(present.values()), (dout, dfinal))
    return {"out": out, "final": final} | dict(zip(present, found, strict=True))


def errors(inputs: Inputs, ends: tuple[int, ...] | None = None, **how: int) -> dict[str, float]:
    """Largest differences from the definition, each relative to the largest value (at least 1) of what is compared."""
    ours = results(lambda x: kernels(x, ends, **how), inputs)
    truth = results(lambda x: definition(*x) if ends is None else packed(x, ends), inputs, torch.float64)
    assert ours["out"].dtype == inputs[2].dtype and ours["final"].dtype == torch.float32
    return {name: worst(ours[name], truth[name]) for name in truth}


def worst(ours: Tensor, truth: Tensor) -> float:
    assert ours.shape == truth.shape and truth.isfinite().all()
    difference = (ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1)
    return difference.item() if difference.isfinite() else float("inf")


def ratios(inputs: Inputs) -> dict[str, float]:
    """Root mean square errors over those of the torch form in the same precision."""
    truth = results(lambda x: definition(*x), inputs, torch.float64)
    ours, torchs = results(kernels, inputs), results(lambda x: chunked(*x), inputs)
    return {
        name: ((ours[name].double() - x).norm() / (torchs[name].double() - x).norm()).item()
        for name, x in truth.items()
    }


def close(found: dict[str, float], limit: float, what: object) -> None:
    assert all(error < limit for error in found.values()), (what, found)


def check_shapes() -> None:
    for n, dim, dim_v, decay, state, how in (
        (1, 16, 5, True, True, {}),
        (20, 1, 1, True, True, {}),
        (15, 32, 16, True, False, {"chunk": 16}),
        (63, 16, 40, False, True, {"chunk": 64}),
        (64, 24, 16, True, True, {"chunk": 32}),
        (65, 64, 33, True, True, {"chunk": 64, "channels": 32}),
        (130, 16, 20, True, True, {"chunk": 64}),
    ):
        close(errors(draw(n, dim, dim_v, decay=decay, state=state), **how), 1e-5, (n, dim, dim_v))


def check_packing() -> None:
    ends = (0, 1, 1, 34, 70)
    close(errors(draw(70, 16, 8, sequences=4), ends), 1e-5, "packed")
    close(errors(draw(70, 16, 8, decay=False, state=False), ends, chunk=64), 1e-5, "packed, no state")


def check_extremes() -> None:
    """Log decays of −30, −100 and −∞, strengths of exactly 0, 1 and 2, and keys that are all the same."""
    inputs = draw(70, 16, 8)
    _, k, _, beta, g, _ = inputs
    g[..., 0, [3, 20, 33, 40]], g[..., 0, [5, 41, 69]], g[..., 1, 7:9] = -torch.inf, -30.0, -100.0
    g[..., 1, 40:] = 0.0
    beta[..., 10:20], beta[..., 20:30], beta[..., 30:45] = 0.0, 1.0, 2.0
    k[:, 1] = k[:, 1, :1]
    close(errors(inputs, chunk=64), 1e-5, "extremes")
    g.fill_(-torch.inf)
    close(errors(inputs, chunk=64), 1e-5, "nothing is kept")


def check_layouts() -> None:
    """A decay per head that is expanded, inputs expanded over the batch, and gradients of one result alone."""
    q, k, v, beta, _, state = draw(20, 16, 8)
    fixed = torch.tensor([-0.1, -0.2], device=DEVICE).view(1, 2, 1).expand(2, 2, 20)
    inputs = [q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), v.mT.contiguous().mT, beta, fixed, state]
    inputs = [x.expand(2, *x.shape[1:]) for x in inputs]
    close(errors(inputs), 1e-5, "expanded")
    q.requires_grad_()
    out, final = kernels([q, k, v, beta, None, None])
    alone = [torch.autograd.grad(x.sum(), q, retain_graph=True)[0] for x in (out, final)]
    truth = torch.autograd.grad(definition(q, k, v, beta, None, None)[0].sum(), q)[0]
    assert worst(alone[0], truth) < 1e-5 and not alone[1].any()
    out, final = kernels([x[:, :, :0] for x in (q, k, v, beta)] + [None, state])
    assert out.shape == (1, 2, 0, 8) and torch.equal(final, state)


def check_half() -> None:
    """The interpreter multiplies bfloat16 wrongly (and rounds to it by cutting off), so there it is float16."""
    close(ratios(draw(130, 32, 16, dtype=HALF)), 2.0, HALF)


CHECKS = {f.__name__: f for f in (check_shapes, check_packing, check_extremes, check_layouts, check_half)}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_agree_with_the_definition() -> None:
    environment = dict(os.environ, TRITON_INTERPRET="" if DEVICE == "cuda" else "1")
    command = [sys.executable, "-m", "tests.kernels.test_delta_kernels"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.split() == list(CHECKS), done.stderr[-2000:]


LENGTHS = (1, 63, 64, 65, 500, 2049)
SIZES = ((32, 64), (64, 48), (128, 128), (256, 96))


@pytest.mark.gpu
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_in_float32(n: int, size: tuple[int, int]) -> None:
    close(errors(draw(n, *size)), 1e-5, (n, size))


@pytest.mark.gpu
@pytest.mark.parametrize("n", LENGTHS[1:])
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_in_bfloat16(n: int, size: tuple[int, int]) -> None:
    close(ratios(draw(n, *size, dtype=torch.bfloat16)), 2.0, (n, size))


@pytest.mark.gpu
def test_on_a_gpu_packed() -> None:
    close(errors(draw(500, 64, 48, sequences=5), (0, 1, 64, 64, 129, 500)), 1e-5, "packed")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_bad_input_is_named() -> None:
    from regard.kernels.triton.delta_rule import delta_rule

    q, k, v, beta, g, state = draw(8, 16, 4)
    for name, call in {
        "log_decay": lambda: delta_rule(q, k, v, beta, g[:, :1], state),
        "beta": lambda: delta_rule(q, k, v, beta[..., None], g, state),
        "state": lambda: delta_rule(q, k, v, beta, g, state.mT),
        "ends": lambda: delta_rule(q, k, v, beta, g, ends=(0, 5, 3, 8)),
        "chunk_size": lambda: delta_rule(q, k, v, beta, g, chunk_size=48),
    }.items():
        with pytest.raises(ArgumentError, match=name):
            call()
    for other in (draw(2, 257, 4), draw(2, 16, 4, dtype=torch.float64)):
        with pytest.raises(UnsupportedError, match="take"):
            delta_rule(*other)


def main() -> None:
    torch.set_num_threads(1)
    if DEVICE == "cpu":  # memory that nobody wrote to holds NaN
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        check()
        print(name)


if __name__ == "__main__":
    main()
