"""DeltaNet: linear attention that replaces what it holds at a key (Yang et al. 2024, arXiv 2406.06484)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regard.layers.base import Example
from regard.layers.checks import flags, sizes
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
from regard.layers.short_convolution import ShortConvolution
from regard.recurrence import DeltaInputs, DeltaRule, DeltaState
from regard.recurrence.diagonal import accumulation_dtype
from regard.registry import Paper, mechanism

PAPER = Paper(
    "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", "Yang et al.", 2024, "2406.06484"
)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / √(‖x‖² + eps) over the last axis: length 1 or a little below; smooth at 0. Taken in at least float32."""
    wide = x.to(accumulation_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


@mechanism(
    "deltanet",
    paper=PAPER,
    cost="O(N·(C·(Dk+Dv+C) + Dk·Dv)) time per head; a state of H·Dk·Dv, that is dim²/H by default, and K−1 inputs",
    compiles=False,
    example=lambda: Example(settings={"value_dim": 3, "chunk_size": 8}),
    **RECURRENT,
)
class DeltaNet(RecurrentLayer):
    """S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ ; o_t = S_tᵀ q_t · Dk^{−1/2} ; y_t = W_o RMSNorm_head(o_t).

    q, k, v: linear, then a causal depthwise convolution of `kernel_size`, then SiLU; q and k of length 1 per head;
    β_t = σ(W_b x_t), one per head. negative_eigenvalues: β ← 2β, so that I − βkkᵀ may reflect (eigenvalue down to −1).
    key_dim: Dk, value_dim: Dv, None = dim/heads. The paper's size has 4 heads. chunk_size does not change the result.

    The state's inner one is a DeltaState, its window (B, kernel_size − 1, H·(2·Dk + Dv)): q, k and v side by side.
    """

    inner_state = DeltaState
    windows = 1
    mixer: DeltaRule

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        kernel_size: int = 4,
        negative_eigenvalues: bool = False,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(dim, heads)
        self.key_dim = share_of(dim, 1, 1, heads, "key_dim") if key_dim is None else key_dim
        self.value_dim = share_of(dim, 1, 1, heads, "value_dim") if value_dim is None else value_dim
        sizes(key_dim=self.key_dim, value_dim=self.value_dim, chunk_size=chunk_size)
        flags(negative_eigenvalues=negative_eigenvalues)
        self.negative_eigenvalues = negative_eigenvalues
        self.mixer = DeltaRule(chunk_size)
        self.widths = [heads * self.key_dim, heads * self.key_dim, heads * self.value_dim]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, width, bias=False) for width in self.widths)
        self.b_proj = nn.Linear(dim, heads, bias=False)
        self.convolution = ShortConvolution(sum(self.widths), kernel_size)
        self.norm = nn.RMSNorm(self.value_dim, eps=1e-5)
        self.o_proj = nn.Linear(self.widths[2], dim, bias=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Convolved q, k, v, of unit length where they address the state, and β."""
        joined = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)
        convolved, window = self.convolution(joined, key_padding, None if state is None else state.windows[0])
        q, k, v = (split_heads(t, self.heads) for t in convolved.split(self.widths, -1))
        strength = self.b_proj(x).transpose(1, 2)
        beta = strength.to(accumulation_dtype(strength)).sigmoid() * (2 if self.negative_eigenvalues else 1)
        inputs = DeltaInputs(unit(q) * self.key_dim**-0.5, unit(k), v, at_real_tokens(beta, key_padding))
        return Read(inputs, (window,))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm of each head, projection."""
        return self.o_proj(join_heads(self.norm(mixed)))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is the loop over the tokens with I − β k kᵀ written out."""
        layer = cls(8, 2, chunk_size=4, negative_eigenvalues=True).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        q, k, v, beta, _ = layer.read(x, None, None).inputs
        s, out = torch.zeros(2, 2, 4, 4, dtype=torch.float64), []
        for t in range(11):
            erase = torch.eye(4).double() - torch.einsum("bh,bhi,bhj->bhij", beta[:, :, t], k[:, :, t], k[:, :, t])
            s = erase @ s + torch.einsum("bh,bhk,bhv->bhkv", beta[:, :, t], k[:, :, t], v[:, :, t])
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], s))
        return layer(x).out, layer.o_proj(layer.norm(torch.stack(out, 1)).flatten(2))
