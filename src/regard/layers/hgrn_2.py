"""HGRN-2: HGRN's gates with a matrix state, the write gate being the key (Qin et al. 2024, arXiv 2404.07904)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.layers.base import Example
from regard.layers.checks import sizes
from regard.layers.forget_gate import ForgetGate
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
from regard.registry import Paper, mechanism

PAPER = Paper("HGRN2: Gated Linear RNNs with State Expansion", "Qin et al.", 2024, "2404.07904")


@mechanism(
    "hgrn-2",
    paper=PAPER,
    cost="O(N·(C·(Dk+Dv) + Dk·Dv)) time per head; a state of H·Dk·Dv, that is 128·dim in the paper's size",
    compiles=False,
    example=lambda: Example(settings={"key_dim": 3, "layer": 1, "layers": 3}),
    **RECURRENT,
)
class HGRN2Layer(RecurrentLayer):
    """S_t = diag(f_t) S_{t−1} + (1 − f_t) v_tᵀ ; o_t = S_tᵀ q_t · Dk^{−1/2} ; y_t = W_o RMSNorm(o_t), no gate.

    f = l + (1 − l) ⊙ σ(W_f x), lower bound l as in `ForgetGate`; the key is tied, k = 1 − f; q = SiLU(W_q x);
    v = W_i x with Dv = dim/heads. key_dim: Dk, None = dim/heads; the paper has dim/128 heads of 128.
    layer of layers, or lower_bound: how much is kept at least. chunk_size does not change the result.
    """

    mixer: DiagonalDecay

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        layer: int = 0,
        layers: int = 1,
        lower_bound: float | None = None,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(dim, heads)
        value_dim = share_of(dim, 1, 1, heads, "another dim")
        self.key_dim = value_dim if key_dim is None else key_dim
        sizes(key_dim=self.key_dim, chunk_size=chunk_size)
        self.mixer = DiagonalDecay(chunk_size)
        self.forget_gate = ForgetGate(layer, layers, lower_bound)
        self.q_proj = nn.Linear(dim, heads * self.key_dim, bias=False)
        self.f_proj = nn.Linear(dim, heads * self.key_dim, bias=False)
        self.i_proj = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Queries, tied keys, values, and log f per channel."""
        log_f, write = self.forget_gate(self.f_proj(x))
        q, k, v, g = (
            split_heads(t, self.heads) for t in (silu(self.q_proj(x)), write.to(x.dtype), self.i_proj(x), log_f)
        )
        k, g = at_real_tokens(k, key_padding), at_real_tokens(g, key_padding)
        return Read(DiagonalInputs(q * self.key_dim**-0.5, k, v, g))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm over the concatenated heads, projection."""
        return self.o_proj(self.norm(join_heads(mixed)))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is the loop over the tokens, with f itself instead of its logarithm."""
        layer = cls(8, 2, layer=1, layers=4, chunk_size=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        f = (0.25 + 0.75 * layer.f_proj(x).sigmoid()).view(2, 11, 2, 4)
        q, v = silu(layer.q_proj(x)).view(2, 11, 2, 4), layer.i_proj(x).view(2, 11, 2, 4)
        s, out = torch.zeros(2, 2, 4, 4, dtype=torch.float64), []
        for t in range(11):
            s = f[:, t, :, :, None] * s + torch.einsum("bhk,bhv->bhkv", 1 - f[:, t], v[:, t])
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, t] / 2, s).flatten(1))
        return layer(x).out, layer.o_proj(layer.norm(torch.stack(out, 1)))
