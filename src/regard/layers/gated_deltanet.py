"""Gated DeltaNet: the delta rule on a state that also decays (Yang et al. 2024, arXiv 2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from regard.layers.base import Example
from regard.layers.decay_gate import DecayGate
from regard.layers.deltanet import DeltaNet
from regard.layers.recurrent import RECURRENT, Read, RecurrentState, at_real_tokens, join_heads, share_of
from regard.registry import Paper, mechanism

PAPER = Paper("Gated Delta Networks: Improving Mamba2 with Delta Rule", "Yang et al.", 2024, "2412.06464")


@mechanism(
    "gated-deltanet",
    paper=PAPER,
    cost="O(N·(C·(Dk+Dv+C) + Dk·Dv)) time per head; a state of H·Dk·Dv, that is 1.5·dim·Dk by default, and K−1 inputs",
    compiles=True,
    example=lambda: Example(settings={"value_dim": 2, "chunk_size": 8}),
    **RECURRENT,
)
class GatedDeltaNet(DeltaNet):
    """S' = α_t S_{t−1} ; S_t = S' + β_t k_t (v_t − S'ᵀ k_t)ᵀ ; y_t = W_o(RMSNorm_head(S_tᵀ q_t) ⊙ SiLU(W_g x_t)).

    First the state decays, then it is read, erased and written at k_t. log α_t = −A·softplus(W_a x_t + b), one per
    head (`DecayGate`, A ~ U(0, 16) at first); the rest, the scale Dk^{−1/2} of q with it, as in `DeltaNet`.
    key_dim: Dk, None = 3·dim/(4·heads), which is the paper's 256 for 3 heads at 1024 and 6 at 2048; value_dim: Dv,
    None = 2·Dk.
    """

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
        wanted = share_of(dim, 3, 4, heads, "key_dim") if key_dim is None else key_dim
        super().__init__(
            dim,
            heads,
            key_dim=wanted,
            value_dim=2 * wanted if value_dim is None else value_dim,
            kernel_size=kernel_size,
            negative_eigenvalues=negative_eigenvalues,
            chunk_size=chunk_size,
        )
        self.a_proj = nn.Linear(dim, heads, bias=False)
        self.decay = DecayGate(heads, 0.0, 16.0)
        self.g_proj = nn.Linear(dim, heads * self.value_dim, bias=False)

    def read(self, x: Tensor, key_padding: Tensor | None, state: RecurrentState | None) -> Read:
        """DeltaNet's, and the log decay."""
        read = super().read(x, key_padding, state)
        _, log_decay = self.decay(self.a_proj(x))
        return read._replace(inputs=read.inputs._replace(log_decay=at_real_tokens(log_decay, key_padding)))

    def write(self, mixed: Tensor, x: Tensor) -> Tensor:
        """Norm of each head, gate, projection."""
        return self.o_proj(join_heads(self.norm(mixed)) * silu(self.g_proj(x)))

    @classmethod
    def identity(cls) -> tuple[Tensor, Tensor]:
        """It is the loop over the tokens with α (I − β k kᵀ) written out."""
        layer = cls(8, 2, chunk_size=4).double()
        x = torch.randn(2, 11, 8, dtype=torch.float64)
        q, k, v, beta, _ = layer.read(x, None, None).inputs
        alpha = torch.exp(-layer.decay.a_log.exp() * (1 + (layer.a_proj(x) + layer.decay.dt_bias).exp()).log())
        s, out = torch.zeros(2, 2, 3, 6, dtype=torch.float64), []
        for t in range(11):
            erase = torch.eye(3).double() - torch.einsum("bh,bhi,bhj->bhij", beta[:, :, t], k[:, :, t], k[:, :, t])
            s = alpha[:, t, :, None, None] * (erase @ s)
            s = s + torch.einsum("bh,bhk,bhv->bhkv", beta[:, :, t], k[:, :, t], v[:, :, t])
            out.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], s))
        return layer(x).out, layer.o_proj(layer.norm(torch.stack(out, 1)).flatten(2) * silu(layer.g_proj(x)))
