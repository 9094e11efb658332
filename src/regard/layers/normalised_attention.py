"""Normalised attention: linear attention over a learned normaliser (Sieber et al. 2024, arXiv 2405.15731)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from regard.errors import UnknownNameError, require
from regard.layers.checks import sizes
from regard.layers.recurrent import Read, RecurrentLayer, RecurrentState, at_real_tokens, join_heads, split_heads
from regard.recurrence import DiagonalDecay, DiagonalInputs
from regard.recurrence.dsf import PAPER
from regard.recurrence.feature_maps import elu_plus_one
from regard.registry import mechanism

Normaliser = Literal["exp", "softplus", "sigmoid"]


@mechanism(
    "normalised-attention",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·dim·(C + D)) time, D = dim/heads; a state of heads·D² in float32",
    causal=True,
    bidirectional=False,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
)
class NormalisedAttention(RecurrentLayer):
    """o_i = (1/η_i) Σ_{j ≤ i} φ(q_i)·φ(k_j) v_j, η_i = η(w·x_i) > 0, one w per head, instead of the sum of the weights.

    normaliser: η is "exp" (default), "softplus" or "sigmoid" of w·x_i. φ = elu + 1 (ours: not established which φ each
    experiment of the paper uses). D = dim / heads, no scale. 1/η multiplies the query: the state stays the plain sum
    S_i = S_{i-1} + φ(k_i) v_iᵀ, not the paper's Λ_i = η_{i-1}/η_i, which is equal and explodes.
    """

    def __init__(self, dim: int, heads: int, *, normaliser: Normaliser = "exp", chunk_size: int = 64) -> None:
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        sizes(chunk_size=chunk_size)
        if normaliser not in get_args(Normaliser):
            raise UnknownNameError("normaliser", str(normaliser), get_args(Normaliser))
        self.mixer: DiagonalDecay = DiagonalDecay(chunk_size)
        self.normaliser = normaliser
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.normaliser_proj = nn.Linear(dim, heads, bias=False)

    def share(self, x: Tensor) -> Tensor:
        """1/η (B, H, N, 1)."""
        w = self.normaliser_proj(x).transpose(1, 2)[..., None]
        if self.normaliser == "exp":
            return (-w).exp()
        return 1 / softplus(w) if self.normaliser == "softplus" else 1 + (-w).exp()

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Features of queries, over the normaliser, and of keys, 0 at padding."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = elu_plus_one(q) * self.share(x), at_real_tokens(elu_plus_one(k), key_padding)
        return Read(DiagonalInputs(q.to(v.dtype), k.to(v.dtype), v))  # one dtype, also where autocast widened the e^x

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """The output projection."""
        return self.o_proj(join_heads(mixed))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is diag(1/η) tril(φ(Q) φ(K)ᵀ) V."""
        layer = cls(8, 2, chunk_size=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        q, k, v = (p(x).view(2, 11, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        eta = layer.normaliser_proj(x).mT.exp()[..., None]
        weight = ((nn.functional.elu(q) + 1) @ (nn.functional.elu(k) + 1).mT).tril() / eta
        return layer(x).out, layer.o_proj((weight @ v).transpose(1, 2).reshape(2, 11, 8))
