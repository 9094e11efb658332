"""The Triton kernels of the delta rule against its definition in float64: in Triton's CPU interpreter, or on a GPU.

The interpreter must be chosen before Triton is imported: where there is no GPU, this file runs itself in a process of
its own (`python -m tests.kernels.test_delta_kernels`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("q", "k", "v", "beta", "log_decay", "state")
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


def errors(inputs: Inputs, ends: tuple[int, ...] | None = None, chunk: int = 64) -> dict[str, float]:
    """Largest differences from the definition, each relative to the largest value (at least 1) of what is compared."""
    from regard.kernels.triton.delta_rule import delta_rule
    from regard.kernels.triton.delta_rule_layout import launches

    given = [None if x is None else x.detach().requires_grad_() for x in inputs]
    q, _, v = given[:3]
    how = replace(launches(q.shape[3], v.shape[3], q.dtype), chunk=chunk)
    out, final = delta_rule(*given, ends=ends, how=how)
    assert out.dtype == v.dtype and final.dtype == torch.float32
    true = packed(given, ends) if ends is not None else definition(*given)
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    present = {name: x for name, x in zip(NAMES, given, strict=True) if x is not None}
    ours = torch.autograd.grad((out, final), list(present.values()), (dout, dfinal))
    truth = torch.autograd.grad(true, list(present.values()), (dout.double(), dfinal.double()))
    compared = {"out": (out, true[0]), "final": (final, true[1])} | dict(
        zip(present, zip(ours, truth, strict=True), strict=True)
    )
    return {name: worst(a, b) for name, (a, b) in compared.items()}


def worst(ours: Tensor, truth: Tensor) -> float:
    assert ours.shape == truth.shape and truth.isfinite().all()
    difference = (ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1) if truth.numel() else truth.sum()
    return difference.item() if difference.isfinite() else float("inf")


def close(found: dict[str, float], limit: float, what: object) -> None:
    assert all(error < limit for error in found.values()), (what, found)


def check_shapes() -> None:
    for n, dim, dim_v, decay, state, chunk in (
        (1, 16, 5, True, True, 64), (15, 32, 16, True, False, 16), (63, 16, 40, False, True, 64),
        (64, 24, 16, True, True, 32), (65, 64, 33, True, True, 64), (130, 16, 20, True, True, 64),
    ):  # fmt: skip
        close(errors(draw(n, dim, dim_v, decay=decay, state=state), chunk=chunk), 1e-5, (n, dim, dim_v))


def check_packing() -> None:
    ends = (0, 1, 1, 34, 70)
    close(errors(draw(70, 16, 8, sequences=4), ends), 1e-5, "packed")


def check_extremes() -> None:
    """Log decays of −30, −100 and −∞, strengths of exactly 0, 1 and 2, and keys that are all the same."""
    inputs = draw(70, 16, 8)
    _, k, _, beta, g, _ = inputs
    g[..., 0, [3, 20, 33, 40]], g[..., 0, [5, 41, 69]], g[..., 1, 7:9] = -torch.inf, -30.0, -100.0
    g[..., 1, 40:] = 0.0
    beta[..., 10:20], beta[..., 20:30], beta[..., 30:45] = 0.0, 1.0, 2.0
    k[:, 1] = k[:, 1, :1]
    close(errors(inputs), 1e-5, "extremes")


CHECKS = {f.__name__: f for f in (check_shapes, check_packing, check_extremes)}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_agree_with_the_definition() -> None:
    environment = dict(os.environ, TRITON_INTERPRET="" if DEVICE == "cuda" else "1")
    command = [sys.executable, "-m", "tests.kernels.test_delta_kernels"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and done.stdout.split() == list(CHECKS), done.stderr[-2000:]


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
