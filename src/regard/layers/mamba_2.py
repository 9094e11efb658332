"""Mamba-2: a selective state space model as a layer (Dao and Gu 2024, arXiv 2405.21060)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.errors import require
from regard.layers.base import Example
from regard.layers.checks import sizes
from regard.layers.decay_gate import DecayGate
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
from regard.recurrence.ssd import PAPER, SSD, SSDInputs
from regard.registry import mechanism


@mechanism(
    "mamba-2",
    paper=PAPER,
    cost="O(N·(C·(S+P) + S·P)) time per head; a state of H·S·P, that is 256·dim by default, and K−1 inputs",
    compiles=False,
    example=lambda: Example(settings={"key_dim": 3, "value_dim": 2, "groups": 2}),
    **RECURRENT,
)
class Mamba2(RecurrentLayer):
    """S_t = e^{Δ_t A} S_{t−1} + b_t (Δ_t x_t)ᵀ ; y_t = S_tᵀ c_t + D x_t ; out_t = W_o RMSNorm(y_t ⊙ SiLU(z_t)).

    z, (x, b, c) and Δ are linear in the tokens; x, b, c pass together through a causal depthwise convolution with bias
    and SiLU; Δ = softplus(· + bias), A = −exp(A_log), one of each per head (`DecayGate`, −A ~ U(1, 16) at first);
    D begins as 1. b and c are shared by the heads of a group; the norm is over the channels of a group.
    key_dim: S, the paper's state size; value_dim: P, the head's width, None = 2·dim/heads, which is the paper's 64 for
    dim/32 heads. groups divides heads. No scale on c. chunk_size does not change the result.

    The state's inner one is a DiagonalState, s (B, H, S, P), its window (B, kernel_size − 1, H·P + 2·groups·S).
    """

    windows = 1
    mixer: SSD

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        key_dim: int = 128,
        value_dim: int | None = None,
        groups: int = 1,
        kernel_size: int = 4,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(dim, heads)
        sizes(groups=groups, key_dim=key_dim, chunk_size=chunk_size)
        require(heads % groups == 0, "groups", groups, f"a divisor of heads={heads}")
        value_dim = share_of(dim, 2, 1, heads, "value_dim") if value_dim is None else value_dim
        sizes(value_dim=value_dim)
        inner = heads * value_dim
        self.groups = groups
        self.mixer = SSD(chunk_size)
        self.widths = [inner, groups * key_dim, groups * key_dim]
        self.z_proj = nn.Linear(dim, inner, bias=False)
        self.xbc_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(dim, heads, bias=False)
        self.convolution = ShortConvolution(sum(self.widths), kernel_size, bias=True)
        self.decay = DecayGate(heads, 1.0, 16.0)
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.o_proj = nn.Linear(inner, dim, bias=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Convolved x, b, c, the step sizes and the log decay."""
        window = None if state is None else state.windows[0]
        convolved, window = self.convolution(self.xbc_proj(x), key_padding, window)
        values, b, c = convolved.split(self.widths, -1)
        dt, log_decay = (at_real_tokens(t, key_padding) for t in self.decay(self.dt_proj(x)))
        b, c = split_heads(b, self.groups), split_heads(c, self.groups)
        return Read(SSDInputs(split_heads(values, self.heads), dt, log_decay, b, c, self.skip), (window,))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Gate, then the norm of each group, projection."""
        gated = (join_heads(mixed) * silu(self.z_proj(x))).unflatten(-1, (self.groups, -1))
        normed = nn.functional.rms_norm(gated, gated.shape[-1:], eps=1e-5).flatten(2)
        return self.o_proj(normed * self.norm_weight)

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is the paper's quadratic form: (C Bᵀ ⊙ the products of decays) Δx + D x."""
        layer = cls(8, 4, key_dim=3, groups=2, chunk_size=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        values, dt, log_decay, b, c, skip = layer.read(x, None, None).inputs
        b, c = b[:, [0, 0, 1, 1]], c[:, [0, 0, 1, 1]]
        decays = torch.zeros(2, 4, 11, 11, dtype=torch.float64)
        for t in range(11):
            for s in range(t + 1):
                decays[:, :, t, s] = log_decay[:, :, s + 1 : t + 1].sum(-1).exp()
        out = (c @ b.mT * decays) @ (dt[..., None] * values) + skip[:, None, None] * values
        gated = (out.transpose(1, 2).flatten(2) * silu(layer.z_proj(x))).view(2, 11, 2, 8)
        normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + 1e-5)
        return layer(x).out, layer.o_proj(normed.flatten(2) * layer.norm_weight)
