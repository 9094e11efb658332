"""The layer around Lightning Attention-2: TransNormerLLM's token mixer (Qin et al. 2024, arXiv 2401.04658)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.errors import UnknownNameError, require
from regard.layers.checks import sizes
from regard.layers.recurrent import RECURRENT, Read, RecurrentLayer, RecurrentState, join_heads, split_heads
from regard.recurrence import LightningAttention2, LightningInputs, tnl_log_decay
from regard.recurrence.lightning_attention_2 import PAPER
from regard.registry import mechanism

Preset = Literal["tnl-code", "tnl-paper"]


@mechanism(
    "lightning-attention-2",
    paper=PAPER,
    cost="O(N·D·(C + D)) time, O(N·D) memory; a state of H·D² in float32",
    compiles=True,
    **RECURRENT,
)
class LightningAttention2Layer(RecurrentLayer):
    """Causal linear attention with a fixed decay per head: S ← λ S + k vᵀ, o = Sᵀ q, then a norm and a gate.

    The two sources differ, so each is a preset. "tnl-code", as released later: q, k, v = SiLU(x W), LayerNorm over the
    concatenated heads, a sigmoid gate of rank D, λ = exp(−s_h·(1 − l/(L−1) + 1e-5)) with ALiBi slopes s_h. "tnl-paper":
    q, k = SiLU(x W), v = x W, SimpleRMSNorm, a linear gate, λ = exp(−(8h/H)·(1 − l/L)).
    layer of layers: which one this is, l of L; deep layers forget less. chunk_size does not change the result.

    Padding neither writes to the state nor lets it decay. The state's inner one is a DiagonalState, s (B, H, D, D)
    in float32.
    """

    mixer: LightningAttention2

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
        super().__init__(dim, heads)
        require(dim % heads == 0, "heads", heads, f"a divisor of dim={dim}")
        sizes(chunk_size=chunk_size)
        if preset not in get_args(Preset):
            raise UnknownNameError("preset", str(preset), get_args(Preset))
        self.preset = preset
        slopes: Literal["code", "paper"] = "code" if preset == "tnl-code" else "paper"
        with torch.device("cpu"):  # its numbers are settings, also where parameters are made without memory
            decay = tnl_log_decay(heads, layer=layer, layers=layers, slopes=slopes)
        self.mixer = LightningAttention2(tuple(decay.tolist()), chunk_size)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        rank = dim // heads
        self.gate: nn.Module
        if preset == "tnl-code":
            self.norm: nn.Module = nn.LayerNorm(dim)
            self.gate = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False), nn.Sigmoid())
        else:
            self.norm = nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)  # SimpleRMSNorm: no gain
            self.gate = nn.Linear(dim, dim, bias=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """Queries and keys through SiLU; values too, in TNL's code."""
        q, k, v = silu(self.q_proj(x)), silu(self.k_proj(x)), self.v_proj(x)
        if self.preset == "tnl-code":
            v = silu(v)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        return Read(LightningInputs(q, k, v, key_padding))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm over the concatenated heads, gate, projection."""
        return self.o_proj(self.norm(join_heads(mixed)) * self.gate(x))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is one masked product per head, norm(((Q Kᵀ) ⊙ λ^{t−s}) V) ⊙ gate, with the layer's own weights."""
        layer = cls(8, 2, chunk_size=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        q, k, v = (silu(p(x)).view(2, 11, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        t = torch.arange(11)
        rate = torch.tensor(layer.mixer.log_decay, dtype=torch.float64).exp()[:, None, None]
        m = (rate ** (t[:, None] - t).clamp(min=0)).tril()
        out = ((q @ k.mT * m) @ v).transpose(1, 2).reshape(2, 11, 8)
        return layer(x).out, layer.o_proj(layer.norm(out) * layer.gate(x))

    def extra_repr(self) -> str:
        """What is not a parameter."""
        known: dict[str, Any] = {"preset": self.preset, "log_decay": self.mixer.log_decay}
        return ", ".join(f"{name}={value}" for name, value in known.items())
