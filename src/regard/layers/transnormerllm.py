"""TransNormerLLM: its token mixer, its channel mixer, and the block of both (Qin et al. 2023, arXiv 2307.14995)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.layers.base import Output, without_padding
from regard.layers.checks import sizes
from regard.layers.lightning_attention import LightningAttention
from regard.layers.recurrent import RecurrentState, join_heads, split_heads
from regard.recurrence.lightning_attention import PAPER, tiled
from regard.registry import mechanism


@mechanism(
    "transnormerllm",
    paper=PAPER,
    families=("recurrent",),
    cost="O(N·D·(C + D)) time per head, O(N·D) memory; a state of H·D² in float32, 2·H·D² in the first layer",
    causal=True,
    bidirectional=False,
    cross=False,
    patterns=False,
    gqa=False,
    steps=True,
    compiles=False,
)
class TransNormerLLM(LightningAttention):
    """SimpleRMSNorm(((Q Kᵀ) ⊙ M) V) ⊙ U, projected: q, k = SiLU(x W), v and the gate u linear, decay and LRPE-d.

    The preset "tnl-paper" of `LightningAttention`: M_ts = λ^{t−s}, λ = exp(−(8h/H)(1 − l/L)), h from 1; layer 0 of
    `layers` turns q and k by learned angles. The norm over the concatenated heads stands in for softmax's denominator.
    A layer mixes tokens, so this is the mixer only; with residuals and channel mixer it is `TransNormerBlock`.
    """

    def __init__(self, dim: int, heads: int, *, layer: int = 0, layers: int = 1, chunk_size: int = 64) -> None:
        super().__init__(dim, heads, preset="tnl-paper", layer=layer, layers=layers, chunk_size=chunk_size)

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is the first Lightning Attention, tile by tile, between the layer's projections, norm and gate."""
        layer = cls(8, 2, layer=1, layers=3, chunk_size=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        q, k = (split_heads(silu(project(x)), 2) for project in (layer.q_proj, layer.k_proj))
        decay = torch.tensor(layer.mixer.log_decay, dtype=torch.float64)
        out = tiled(q, k, split_heads(layer.v_proj(x), 2), decay, block=3)
        return layer(x).out, layer.o_proj(layer.norm(join_heads(out)) * layer.gate(x))


class SimpleRMSNorm(nn.RMSNorm):
    """x·√d / ‖x‖₂ over the last axis of width d, without a gain; eps is added to the mean square."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=False)


class SGLU(nn.Module):
    """A gated linear unit without an activation: (x W_v ⊙ x W_u) W_o, (…, dim) → (…, dim), of inner width `width`."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        sizes(width=width)
        self.v_proj, self.u_proj = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product of two linear maps, projected."""
        return self.o_proj(self.v_proj(x) * self.u_proj(x))


class TransNormerBlock(nn.Module):
    """x ← x + mixer(norm(x)), then x ← x + SGLU(norm(x)), both norms SimpleRMSNorm.

    width: of the SGLU, None = 2·dim (ours). Call it as a layer, (B, N, dim) → Output; the state is the mixer's."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        width: int | None = None,
        layer: int = 0,
        layers: int = 1,
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        self.norm = SimpleRMSNorm(dim)
        self.mixer = TransNormerLLM(dim, heads, layer=layer, layers=layers, chunk_size=chunk_size)
        self.channels = SGLU(dim, 2 * dim if width is None else width)

    def forward(self, x: Tensor, *, key_padding: Tensor | None = None, state: RecurrentState | None = None) -> Output:
        """x (B, N, dim), key_padding (B, N) bool, True = real token; padding comes out as zeros."""
        mixed, state, _ = self.mixer(self.norm(x), key_padding=key_padding, state=state)
        x = x + mixed
        return Output(without_padding(x + self.channels(self.norm(x)), key_padding), state)
