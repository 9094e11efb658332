"""TNL's token mixer: Lightning Attention, positions turned in the first layer (Qin et al. 2024, arXiv 2405.17381)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.layers.lightning_attention_2 import LightningAttention2Layer, Preset
from regard.layers.recurrent import Read, RecurrentState, positions
from regard.recurrence.lightning_attention import lrpe, lrpe_angles
from regard.registry import Paper, mechanism

PAPER = Paper(
    "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    "Qin et al.", 2024, "2405.17381",
)  # fmt: skip


@mechanism(
    "lightning-attention",
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
class LightningAttention(LightningAttention2Layer):
    """Lightning Attention-2's layer and, in layer 0, LRPE-d: a_ts = Σ_d q_td k_sd λ^{t−s} cos(θ_d (t − s)), θ learned.

    Presets, layer of layers, decay: as in `LightningAttention2Layer`; "tnl-code" (what was released) is the default,
    "tnl-paper" what is printed. h counts from 1, so no head is without decay. The angles θ (H, 1, D) begin at
    10000^{−2i/dim} over all channels. They turn q and k after SiLU, by the number of each token among its row's real
    tokens, which the state carries on. Other layers have the decay only. Not Yang et al.'s Gated Linear Attention.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        preset: Preset = "tnl-code",
        layer: int = 0,
        layers: int = 1,
        chunk_size: int = 64,
    ) -> None:
        super().__init__(dim, heads, preset=preset, layer=layer, layers=layers, chunk_size=chunk_size)
        self.theta = nn.Parameter(lrpe_angles(heads, dim // heads)) if layer == 0 else None

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Queries and keys of Lightning Attention-2, turned in the first layer."""
        inputs, windows = super().read(x, key_padding, state)
        if self.theta is None:
            return Read(inputs, windows)
        where = positions(x, key_padding, state)
        return Read(inputs._replace(q=lrpe(inputs.q, where, self.theta), k=lrpe(inputs.k, where, self.theta)), windows)

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is one masked product per head, with a cosine of each channel's angle for every distance."""
        layer = cls(8, 2, chunk_size=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        q, k, v = (silu(p(x)).view(2, 11, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        t = torch.arange(11)
        apart = (t[:, None] - t).clamp(min=0)
        assert layer.theta is not None
        turned = (apart[..., None] * layer.theta[:, :, None]).cos()  # (H, N, N, D)
        rate = torch.tensor(layer.mixer.log_decay, dtype=torch.float64).exp()[:, None, None]
        scores = torch.einsum("bhid,bhjd,hijd->bhij", q, k, turned) * rate**apart
        out = (scores.tril() @ v).transpose(1, 2).reshape(2, 11, 8)
        return layer(x).out, layer.o_proj(layer.norm(out) * layer.gate(x))
