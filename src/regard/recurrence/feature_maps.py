"""Feature maps of linear attention: φ with φ(q)·φ(k) in place of e^{q·k}. Every map works on the last axis.

Normalised linear attention divides by Σ_j φ(q)·φ(k_j), so φ(q)·φ(k) must not be negative: each map says why it is not.
Padding is masked after the map (φ(0) ≠ 0). Maps keep the dtype; sums over features belong in float32 at least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.errors import require


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0: x + 1 for x > 0, else e^x (Katharopoulos et al. 2020, arXiv 2006.16236). (…, D) → (…, D)."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def relu(x: Tensor) -> Tensor:
    """max(x, 0) ≥ 0, often 0 for all keys together: the denominator needs its eps. (…, D) → (…, D)."""
    return x.clamp(min=0)


def taylor(x: Tensor, order: int = 2) -> Tensor:
    """φ(q)·φ(k) = Σ_{r ≤ order} s^r / r!, s = q·k/√D: the expansion of e^s (order 2: Based, arXiv 2402.18668).

    (…, D) → (…, Σ_r D^r): the r-fold products of entries of x / D^{1/4}, each over √r!. Positive for an even order;
    for order 2 at least 1/2. Order 2 has 1 + D + D² features, `taylor_2_compressed` the same inner product in fewer."""
    require(order >= 0, "order", order, "an int ≥ 0")
    x = x / x.shape[-1] ** 0.25
    power = torch.ones_like(x[..., :1])
    features = [power]
    for r in range(1, order + 1):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)
        features.append(power / math.sqrt(math.factorial(r)))
    return torch.cat(features, -1)


def taylor_2_compressed(x: Tensor) -> Tensor:
    """The map of order 2 without its repetitions, 1 + s + s²/2 in 1 + D + D(D+1)/2 features: 153 instead of 273 for 16.

    x_i x_j and x_j x_i are one feature x_i x_j / √D, i < j; the squares are x_i² / √(2D). (…, D) → (…, 1 + D + …)."""
    dim = x.shape[-1]
    x = x / dim**0.25
    i, j = torch.triu_indices(dim, dim, 1, device=x.device)
    products = x[..., i] * x[..., j]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() / math.sqrt(2), products], -1)


def both_signs(u: Tensor) -> Tensor:
    """[u, −u]: (…, D) → (…, 2D)."""
    return torch.cat([u, -u], -1)


def hedgehog_exp(u: Tensor) -> Tensor:
    """[e^u, e^{−u}] > 0 (Hedgehog, arXiv 2402.04347); overflows where |u| > 88 in float32. (…, D) → (…, 2D)."""
    return both_signs(u).exp()


def hedgehog_exp_of_queries(u: Tensor) -> Tensor:
    """`hedgehog_exp(u)` over its largest feature, which cancels in o = φ(q)ᵀS / φ(q)ᵀz: for queries only. ≤ 1."""
    return (both_signs(u) - u.detach().abs().amax(-1, keepdim=True)).exp()


def hedgehog_softmax_halves(u: Tensor) -> Tensor:
    """[softmax(u), softmax(−u)] > 0, each half with sum 1, so φ·φ ≤ 2: Hedgehog as used. (…, D) → (…, 2D)."""
    return torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)


def hedgehog_joint_softmax(u: Tensor) -> Tensor:
    """softmax([2u, −2u]) > 0 with sum 1: Hedgehog as flash-linear-attention has it. (…, D) → (…, 2D)."""
    return both_signs(2 * u).softmax(-1)
