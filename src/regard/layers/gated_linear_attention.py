"""Gated linear attention: a data-dependent decay for every key channel (Yang et al. 2023, arXiv 2312.06635)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from regard.layers.base import Example
from regard.layers.checks import positive, sizes
from regard.layers.recurrent import (
    RECURRENT,
    Read,
    RecurrentLayer,
    RecurrentState,
    at_real_tokens,
    join_heads,
    share_of,
    split_heads,
)
from regard.recurrence import DiagonalDecay, DiagonalInputs
from regard.recurrence.diagonal import accumulation_dtype
from regard.registry import Paper, mechanism

PAPER = Paper("Gated Linear Attention Transformers with Hardware-Efficient Training", "Yang et al.", 2023, "2312.06635")


@mechanism(
    "gated-linear-attention",
    paper=PAPER,
    cost="O(N·(C·(Dk+Dv) + Dk·Dv)) time per head; a state of H·Dk·Dv, that is dim²/(2H) by default",
    compiles=False,
    example=lambda: Example(settings={"key_dim": 3, "gate_rank": 2, "decay_temperature": 2.0}),
    **RECURRENT,
)
class GatedLinearAttention(RecurrentLayer):
    """S_t = diag(α_t) S_{t−1} + k_t v_tᵀ ; o_t = S_tᵀ q_t · Dk^{−1/2} ; y_t = W_o(RMSNorm_head(o_t) ⊙ SiLU(W_g x_t)).

    log α_t = logsigmoid(W_2 W_1 x_t + b) / τ, W_1: dim → gate_rank, τ = decay_temperature: with 16, α stays near 1.
    q, k, v are linear, without activation. key_dim: Dk, None = dim/(2·heads); value_dim: Dv, None = dim/heads. The
    paper's size has 4 heads. chunk_size does not change the result.
    """

    mixer: DiagonalDecay

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int = 16,
        decay_temperature: float = 16.0,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(dim, heads)
        positive(decay_temperature=decay_temperature)
        self.key_dim = share_of(dim, 1, 2, heads, "key_dim") if key_dim is None else key_dim
        value_dim = share_of(dim, 1, 1, heads, "value_dim") if value_dim is None else value_dim
        sizes(key_dim=self.key_dim, value_dim=value_dim, gate_rank=gate_rank, chunk_size=chunk_size)
        self.decay_temperature = decay_temperature
        self.mixer = DiagonalDecay(chunk_size)
        self.q_proj, self.k_proj = (nn.Linear(dim, heads * self.key_dim, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(dim, heads * value_dim, bias=False) for _ in range(2))
        self.decay_proj = nn.Sequential(
            nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, heads * self.key_dim)
        )
        self.norm = nn.RMSNorm(value_dim, eps=1e-5)
        self.o_proj = nn.Linear(heads * value_dim, dim, bias=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Queries, keys, values, and a log decay per key channel."""
        gate = self.decay_proj(x)
        log_decay = logsigmoid(gate.to(accumulation_dtype(gate))) / self.decay_temperature
        q, k, v, g = (split_heads(t, self.heads) for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x), log_decay))
        return Read(DiagonalInputs(q * self.key_dim**-0.5, k, v, at_real_tokens(g, key_padding)))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm of each head, gate, projection."""
        return self.o_proj(join_heads(self.norm(mixed)) * silu(self.g_proj(x)))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is the loop over the tokens, with α itself instead of its logarithm."""
        layer = cls(8, 2, chunk_size=4, decay_temperature=2.0).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        alpha = layer.decay_proj(x).sigmoid().sqrt().view(2, 11, 2, 2)
        q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        s, out = torch.zeros(2, 2, 2, 4, dtype=torch.float64), []
        for t in range(11):
            s = alpha[:, t, :, :, None] * s + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * 2**-0.5, s))
        out = layer.norm(torch.stack(out, 1)).flatten(2)
        return layer(x).out, layer.o_proj(out * silu(layer.g_proj(x)))
